"""How do checkpoints become files of other tools, and files of other tools checkpoints?

One file for each layout, and the tables of those that are written and read. Imports torch.
"""
