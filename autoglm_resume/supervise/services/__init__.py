"""The supervisor's handles on processes that work beside the ranks.

Each is restarted when it dies, and training never waits for one.
"""
