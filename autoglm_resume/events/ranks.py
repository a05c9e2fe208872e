"""Events that ranks and their savers write. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_resume.events.base import OfRank
from autoglm_resume.records import unsaid


class RankStarted(OfRank):
    pid: int


class RankEnded(OfRank):
    """Its script has; not kept in the journal."""

    code: int


class RankFinished(OfRank):
    """What its script had left to its exit has been done, too; not kept in the journal."""


class StepsPlanned(OfRank, name="steps"):
    """How many the script wants; not kept in the journal."""

    total: int


class ModelReported(OfRank, name="model"):
    hash: str
    model: Mapping[str, Any] | None
    """Its structure, None but of rank 0."""


class StateRestored(OfRank, name="restored"):
    id: str = ""
    step: int | None = None
    seconds: float | None = None
    """It took."""
    memory: bool = False
    """Whether it came from a snapshot in memory."""
    sealed: bool = False
    """Whether the checkpoint may not be on storage yet."""


class PartlyRestored(OfRank):
    """What did not fit, by name."""

    id: str = ""
    step: int | None = None
    skipped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    without_state: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


class Resharded(OfRank):
    """A checkpoint of another number of ranks."""

    id: str = ""
    step: int | None = None
    from_: int | None = None
    """Ranks then."""
    to: int | None = None
    """Ranks now."""
    global_batch: int | None = None
    """Samples that a step takes from now on, None if not known."""
    seeded_anew: tuple[int, ...] = ()
    """Ranks whose generators the checkpoint does not have."""
    rank_zeros: tuple[str, ...] = unsaid(())
    """Buffers that other ranks had otherwise."""


class Refused(OfRank):
    """A rank would not load the checkpoint that the gate had accepted."""

    id: str = ""
    step: int = -1
    sealed: bool = False
    """Whether it was one in memory."""
    kind: str = ""
    """Class of the error."""
    reason: str = "no reason was recorded"
    hint: str = unsaid("")


class FirstStep(OfRank):
    """The first step of the attempt is complete."""

    step: int | None = None


class ModulesImported(OfRank, name="imports"):
    """What the script imported; the next zygote imports `modules` ahead."""

    modules: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    """The project's own, which no zygote may."""
    staged: bool = False
    """Whether the script can become a spare."""


class StartedOver(OfRank):
    """Begun again with nothing imported ahead: the script would have imported another `module`."""

    module: str
    reason: str


class SaveSkipped(OfRank):
    step: int | None = None
    reason: str = "?"


class PartFailed(OfRank, name="save_failed"):
    id: str = ""
    step: int | None = None
    reason: str = "no reason was recorded"


class PartSaved(OfRank, name="saved"):
    """A rank's share of a checkpoint is on storage."""

    id: str = ""
    step: int | None = None
    seconds: float | None = None
    """From `began`."""
    began: float | None = None
    """When training was first held up for it."""
    blocked: float | None = None
    """Seconds for which it was."""
    raw: int = 0
    """Bytes of the state."""
    stored: int = 0
    """Bytes written."""
    shared: int = 0
    """Bytes of `raw` that another rank wrote."""


class SaveFelt(OfRank):
    """What a save has cost training, seen when it was over: held up and slowed down together."""

    step: int | None = None
    """Steps completed by then."""
    seconds: float | None = None
    """Below zero where steps happened to be faster than usual."""


class Committed(OfRank):
    """A checkpoint exists from now on; told by a saver, or by the gate that found it complete."""

    id: str = ""
    step: int
    digest: str = ""
    """Of the manifest."""
    began: float | None = unsaid(None)
    """When training was first held up for it."""
    objects: Mapping[str, str] = {}
    """Digests of what it holds, by name."""


class Pruned(OfRank):
    """Retention deleted it."""

    id: str
    by: str = unsaid("")
    """The command, if it was no saver."""


class SaverLost(OfRank):
    pid: int | None = None
    code: int | None = None


class Finished(OfRank):
    """It has completed all steps and saved the last."""

    step: int | None = None


class Stopped(OfRank):
    """It has saved and stops, as asked."""

    step: int | None = None
    unsaved: str = unsaid("")
    """Why its state could not be saved, if so."""
