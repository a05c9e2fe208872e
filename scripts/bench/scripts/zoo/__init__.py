"""Small programs as people write them, one kind of state each; see train.py."""
