"""The supervisor's handles on the processes beside the ranks: savers, replicator, notifier.
Each starts its process, talks to it, starts it again when it dies, and ends it.
"""
