"""How are a tensor's bytes cut, encoded, put on storage past the page cache, and proven?

Knows of parts and packs, and of no directory of checkpoints.
"""
