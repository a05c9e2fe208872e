"""What follows from what is known: failures, hangs, decisions, history. Pure.

Nothing here touches the clock, a file or a process.
"""
