"""Whether this machine is fit for a job, asked before every start.

What may hang is asked from processes or threads of their own.
"""
