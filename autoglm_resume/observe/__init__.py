"""What people are shown of runs, checkpoints and machines. Views only: nothing here acts.

What follows from a journal alone is in `pure`.
"""
