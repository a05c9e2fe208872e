"""What acts on a run from outside: saving, stopping, pruning.

It asks the supervisor by a signal, and waits for what the journal then says.
"""
