"""What all of the worker stands on: what a session was told, and where it says what happens.

A rank knows both before it runs a line of the script.
"""
