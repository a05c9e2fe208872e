"""How does the state of a script's objects become a snapshot, and a checkpoint become state again?

On as many ranks or on others, as tensors or DTensors, without pickle. Imports torch.
"""
