"""The processes that persist what ranks hand over: a saver per rank, and the replicator.
What they do to a directory of checkpoints, and how they keep out of each other's way.
"""
