"""How the session of a process begins: told by its supervisor or, without one, by the script."""

from __future__ import annotations

from autoglm_resume import output
from autoglm_resume.errors import UsageError
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.worker import ahead, alone, refusing, spare
from autoglm_resume.worker.base import settings
from autoglm_resume.worker.session import Session


def init(
    *,
    checkpoint_dir: str | None = None,
    every_steps: int | None = None,
    every_seconds: float | None = None,
    keep: int = settings.DEFAULT_KEEP,
) -> Session:
    """Begin this process's session; call it once, in every rank.

    Under autoglm the job file decides about checkpoints. The arguments are for the same script
    under plain torchrun or alone: where checkpoints go (default `checkpoints/<script>`), how often
    (default every 300 s), and how many are kept.
    """
    spare.refuse_session()
    output.fill_descriptors()  # before a pack is opened under the number of standard error
    assignment = Assignment.from_environment()
    if assignment is not None:
        if ahead.under_way:
            # Both would count the same steps: checkpoints of one would be taken for the other's.
            raise UsageError(
                "autoglm.init() was called before in this rank, which has one session",
                hint="pass the session on to whoever needs it; for several trainings, such as a"
                " loop over learning rates, start a run for each",
            )
        ahead.under_way = True
        return Session(settings.supervised(assignment), assignment)
    refusing.speak_alone(alone.end_refused)
    return Session(settings.unsupervised(checkpoint_dir, every_steps, every_seconds, keep), None)
