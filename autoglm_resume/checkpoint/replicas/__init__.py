"""What has a replica to get, what may go there, what counts as committed, and what can it mend?

The plan is pure; mirroring and repairing act on it.
"""
