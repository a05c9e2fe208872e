"""The commands, one file each: parse, call, print.

No logic, and nothing heavy before a command is known.
"""
