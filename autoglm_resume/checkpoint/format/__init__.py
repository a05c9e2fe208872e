"""What is a checkpoint, as documents: ids, parts with their tables, manifests, snapshots?

Pure: bytes in, dataclasses out. Whatever is wrong with a document is a CorruptCheckpoint.
"""
