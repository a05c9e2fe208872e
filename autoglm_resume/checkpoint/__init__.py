"""Checkpoints that are proven before they are trusted.

format     a checkpoint as documents                                       (pure)
chunks     bytes cut, encoded, written and proven
store      a directory of checkpoints: commit, examine, judge, keep
write      a snapshot to a part
state      objects to a snapshot, a checkpoint to objects                  (torch)
storage    where copies are kept: directories, buckets
replicas   copies: planned, made, repaired from
interop    the files of other tools                                        (torch)
dcp        storage for torch.distributed.checkpoint                        (torch)
"""
