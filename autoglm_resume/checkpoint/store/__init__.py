"""Which checkpoints are in a directory, are they good, which may be loaded, and which may go?

Commits, examines, judges (gate) and keeps (retention). The gate and retention are pure.
"""
