"""What can be found out about a worker group that is down, or that hangs.

A source that cannot be asked is None, which is not “nothing to say”.
"""
