"""The loop of one run: gate, launch, watch, conclude, decide.

What is pure is in `core`; the ranks of a machine are behind `node`.
"""
