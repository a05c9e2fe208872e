"""What all of `supervise` stands on: event loop, stops, run directory, this machine.

And what a job comes to here: its world size, environment and assignments.
"""
