"""The process that tells people of a run, by webhook or command.

It is told by the supervisor, which never waits for it.
"""
