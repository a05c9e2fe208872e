"""Checkpoints that are proven before they are trusted.

document    untrusted JSON, canonical bytes, digests                       (pure)
structure   what a model is made of, and how two differ                    (pure)
part        one rank's share: its tensors, chunks and packs                (pure)
manifest    what makes parts a checkpoint                                  (pure)
gate        which checkpoint may be loaded, and why                        (pure)
retention   which checkpoints may go                                       (pure)
previous    what a part takes from the one before                          (pure)
renaming    parameters under other names                                   (pure)
codec       how a chunk is encoded                                         (NumPy, zstd)
derived     half precision that float32 determines                         (NumPy)
store       the directory: commit, examine, quarantine, delete
reader      chunks, wherever they lie, decoded and verified
snapshot    a rank's state at one step, as bytes
claims      which rank stores what several hold alike
pace        how hard to compress                                           (pure)
direct      files past the page cache
proving     what was written, read back
packing     chunks into a pack
saver       a snapshot to storage
sealed      a checkpoint that is only in memory yet
replica     what has to be copied, and what counts as committed            (pure)
storage     where replicas are: directories, S3
mirror      one checkpoint to one replica
repair      bad files from replicas
tree        Python state to JSON and tensors, and back                     (torch)
sharding    which box of a tensor a rank has                               (torch)
capture     the state of objects, on its way into a snapshot               (torch)
restore     checkpoint to verified state                                   (torch)
elastic     the same, from another number of ranks                         (torch)
dcp         storage for torch.distributed.checkpoint                       (torch)
exchange    to other formats and back, with `formats`                      (torch)
"""
