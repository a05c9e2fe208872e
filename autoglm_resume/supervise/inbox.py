"""What ranks and their savers say, on its one way: to the attempt, to the run, into the journal."""

from __future__ import annotations

from collections.abc import Callable

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import attempt_of
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.errors import CorruptCheckpoint
from autoglm_resume.events import Event, Tell
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.supervise.attempt import Attempt
from autoglm_resume.supervise.core import history
from autoglm_resume.supervise.core.history import History
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.supervise.node import Node
from autoglm_resume.supervise.persistence import Persistence
from autoglm_resume.supervise.ranks.launcher import StartUp
from autoglm_resume.supervise.save_timer import SaveTimer


class Inbox:
    """Keeps what outlives the attempt that it was said in."""

    def __init__(
        self,
        past: History,
        world_size: int,
        gate: RunGate,
        save_timer: SaveTimer,
        tell: Tell,
        sync: Callable[[], None],
    ) -> None:
        """`sync` makes the journal survive the machine."""
        self._known = dict(past.models)
        self._heard: dict[int, history.Model] = {}
        """What the ranks of the present attempt have reported."""
        self._written = {rank: model for rank, (_, model) in past.declared.items()}
        """What the journal has of each rank last."""
        self._world_size = world_size
        self._gate = gate
        self._save_timer = save_timer
        self._tell = tell
        self._sync = sync
        self._attempt: Attempt | None = None
        self._resume: ResumePoint | None = None
        self._node: Node | None = None
        self._persistence: Persistence | None = None
        self.objects: dict[str, str] = past.objects or {}
        """Digests of what the newest checkpoint holds, by name."""
        self._objects_step = past.checkpointed

    def connect(self, persistence: Persistence) -> None:
        """Whom the savers belong to."""
        self._persistence = persistence

    def begin(self, node: Node, attempt: Attempt, resume: ResumePoint | None) -> None:
        """From here on the ranks of `node` speak of this attempt, which begins with `resume`."""
        self._node, self._attempt, self._resume = node, attempt, resume
        self._heard = {}

    def end(self) -> None:
        """The attempt has ended; its savers may not have."""
        self._attempt = None

    def back_to(self, step: int) -> None:
        """The run goes on from the checkpoint of an earlier step."""
        self._objects_step = min(self._objects_step, step)

    def committed(self, event: events.Committed) -> None:
        """Ranks' files are read in any order, and an older checkpoint may come last."""
        if event.step >= self._objects_step:
            self.objects, self._objects_step = dict(event.objects), event.step

    def from_saver(self, rank: int, event: Event) -> None:
        """Of a save, which may end after the attempt that it is of."""
        if isinstance(event, events.PartSaved | events.Committed | events.PartFailed):
            event = event.but(attempt=attempt_of(event.id))
        self.hear(rank, event)

    def hear(self, rank: int, event: Event) -> None:
        """Of `rank`."""
        if self._attempt is not None and not self._attempt.observe(rank, event):
            return
        kept = self._learnt(rank, event)
        if kept is not None:
            self._tell(kept)

    def _learnt(self, rank: int, event: Event) -> Event | None:
        """Returns what the journal should keep."""
        persistence = self._persistence
        assert persistence is not None  # there are savers, or ranks, which are started later
        match event:
            case events.ModelReported():
                return self._model(rank, event)
            case events.FirstStep():
                persistence.work_on()
                self._gate.clean()
                self._sync()
            case events.ModulesImported(modules=modules, own=own, staged=staged):
                assert self._node is not None  # a rank says this
                self._node.learn(StartUp(modules, own, staged))
            case events.StartedOver(module=module):
                assert self._node is not None
                self._node.unlearn(module)
            case events.PartSaved(blocked=float(blocked), seconds=float(seconds)):
                self._save_timer.saved(blocked, seconds)
            case events.SaveFelt(seconds=float(seconds)):
                self._save_timer.felt(seconds)
            case events.Committed(id=id, step=step):
                if not self._gate.notice(id, step):
                    return None
                self.committed(event)
                persistence.notice()
            case events.Pruned():
                persistence.notice()
            case events.Refused(kind=kind) if kind == CorruptCheckpoint.__name__ and self._resume:
                # Only damage is the checkpoint's own fault. A model that differs is judged by the
                # gate itself, for every checkpoint.
                self._gate.not_loaded(self._resume, event.reason)
        return event

    def _model(self, rank: int, event: events.ModelReported) -> Event | None:
        structure = Structure.from_json(event.model) if event.model else None
        self._heard[rank] = model = history.Model(event.hash, structure)
        self._known = history.heard(self._known, self._heard)
        self._gate.expect_model(history.model_of(self._known, self._world_size))
        written, self._written[rank] = self._written.get(rank), model
        if written is not None and written.hash == event.hash:
            return None
        # A large model's structure is written down once.
        return event if rank == 0 else event.but(model=None)
