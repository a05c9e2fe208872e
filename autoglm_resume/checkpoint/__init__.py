"""Checkpoints that are proven before they are trusted.

document   untrusted JSON, canonical bytes, digests          (pure)
structure  what a model is made of, and how two differ       (pure)
manifest   the documents of a checkpoint and their checks    (pure)
codec      how a chunk is encoded                            (pure)
gate       which checkpoint may be loaded, and why           (pure)
retention  which checkpoints may go                          (pure)
verify     a pack's bytes against its chunk table
store      the directory: commit, examine, quarantine, delete
tree       Python state to JSON and tensors, and back        (torch)
snapshot   a rank's state at one step                        (torch)
saver      snapshot to disk, read back                       (worker side)
restore    disk to verified state                            (torch)
"""
