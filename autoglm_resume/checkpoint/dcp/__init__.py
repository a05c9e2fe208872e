"""Our checkpoints for scripts that save through torch.distributed.checkpoint (DCP).

    from autoglm_resume.checkpoint import dcp as proven

    writer = proven.Writer(compress="auto")
    dcp.save(state_dict, checkpoint_id="ckpts/step-100", storage_writer=writer)
    dcp.load(state_dict, storage_reader=proven.Reader("ckpts/step-100"))

What DCP plans (FSDP2, tensor parallel, resharding to another number of ranks) is stored in our
packs: digested, compressed, read back, and committed by one manifest. A checkpoint lies in
`ckpts/step-0000000100.dcp`, beside those of other steps, so that `autoglm ckpts ckpts`, `verify`,
`inspect` and `prune` know it. Any path whose name ends in a number is one of such a checkpoint.

Each stands for itself: it needs no other one, so whoever removes old ones by hand breaks none.
`DefaultSavePlanner(enable_plan_caching=True)` spares DCP its planning of every save, which takes
seconds from some hundred ranks on.
"""

from __future__ import annotations

from autoglm_resume.checkpoint.dcp.paths import directory_of, newest
from autoglm_resume.checkpoint.dcp.reader import Reader
from autoglm_resume.checkpoint.dcp.writer import Writer

__all__ = ["Reader", "Writer", "directory_of", "newest"]
