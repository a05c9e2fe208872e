"""The ranks of this machine as processes: starting, following, watching and striking them.

A launcher is one file; `launchers` says which a job can name.
"""
