"""What a job is, and reading one: every problem of a job file at once, with its line.

Sections are declared in `spec` and its neighbours; `load` reads.
"""
