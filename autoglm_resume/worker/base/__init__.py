"""What all of the worker stands on: what a session was told, where it says what happens, and the
random generators of a process.
"""
