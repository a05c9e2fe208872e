"""What all of `supervise` stands on: event loop, stops, run directory, this machine.

Nothing here knows of ranks, checkpoints or failures.
"""
