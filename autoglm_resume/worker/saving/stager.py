"""A rank's saves: a snapshot into shared memory, and on to the saver.

Parameters and optimizer state are copied by a thread beside the training, once it is known that
nothing but an optimizer's step changes them (see timing.py), and a hook before that step waits for
the copy (`fence`). Everything else is copied at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoglm_resume.checkpoint.format.snapshot import Snapshot, from_slot
from autoglm_resume.checkpoint.state.capture import CapturedState, Identity
from autoglm_resume.protocol.saver_messages import Message
from autoglm_resume.protocol.shared_memory import Slots
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.saving import device_copy
from autoglm_resume.worker.saving.saver_client import NoSaver, SaverClient
from autoglm_resume.worker.saving.timing import CopyTiming

ROUND = 1 << 20
SPARE = 1 << 16
"""Bytes by which the description of a snapshot may grow, beyond twice its size, before slots are
made anew."""
PATIENCE = 30.0
"""Seconds after `checkpoint.timeout` in which a saver must answer."""
BEAT_SECONDS = 1.0
"""Between two beats while waiting for the saver."""

__all__ = ["NoSaver", "SaveOutcome", "Stager"]


@dataclass(frozen=True)
class SaveOutcome:
    """Of a save that was begun; `reason` says why it failed."""

    id: str
    ok: bool
    reason: str = ""
    told: bool = False
    """Whether the saver has put it into the journal already."""


class Stager:
    """At most one save is under way. `alive` is called now and then while waiting for it."""

    def __init__(self, settings: Settings, name: str | None, alive: Callable[[], None]) -> None:
        """`name` is the saver's; without one, this process starts its own."""
        self._client = SaverClient(settings, name)
        self._client.on_slots = self._map
        self._client.before_close = self._unmap
        self._count = settings.checkpoint.memory
        self._alive = alive
        self._copier = device_copy.DeviceCopier()
        self._copy: device_copy.DeviceCopy | None = None
        self._under_way: str | None = None
        self._deadline = 0.0
        """Monotonic seconds by which the saver must have said what became of it."""
        self._timeout = settings.checkpoint.options.timeout
        self._failed: SaveOutcome | None = None
        """Set by the copying thread."""
        self._outcomes: list[SaveOutcome] = []
        self._timing = CopyTiming()
        self._pid = os.getpid()
        self._hook: object = None
        self._watched = False
        """Whether the copy under way was made at once and is to be compared before a step."""
        self._pinned = False
        self._touched = False
        self._newest = -1
        self._requested = 0
        # A saver of the supervisor's goes on without this process.
        atexit.register(self.wait if name is None else self.wait_for_copy)

    @property
    def short(self) -> str:
        """Why there are fewer slots than were asked for, if so."""
        return self._client.short

    @property
    def slow(self) -> str:
        """Why saves hold training up for the whole copy, if they do."""
        if not self._timing.changed:
            return ""
        return (
            f"{self._timing.changed} is changed between a save and the next optimizer.step(): every"
            " save copies the whole state at once"
        )

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        self._poll(0)
        return self._under_way is not None

    def outcomes(self) -> list[SaveOutcome]:
        """What became of saves since the last call."""
        self._poll(0)
        found, self._outcomes = self._outcomes, []
        return found

    def held(self, id: str | None) -> Snapshot | None:
        """This rank's snapshot of checkpoint `id`, if its saver still has it in memory."""
        try:
            held = self._hello()
        except NoSaver:
            return None
        slots = self._client.slots
        if held is None or slots is None or held["id"] != id:
            return None
        slot = slots.view(held["slot"])
        try:
            return from_slot(bytes(slot[held["at"] : held["at"] + held["length"]]), slot)
        except (ValueError, LookupError, TypeError):
            return None  # overwritten since, by a copy that was not completed

    def _hello(self) -> Message | None:
        """Where the newest snapshot lies. A save of the rank before is this one's from now on."""
        reply = self._client.hello()
        held: Message | None = reply["held"]
        self._newest = held["slot"] if held else -1
        if self._copy is None:
            self._take_over(reply["persisting"])
        return held

    def _take_over(self, id: str | None) -> None:
        self._under_way = id
        self._deadline = self._patience()

    def _patience(self) -> float:
        return time.monotonic() + self._timeout + PATIENCE

    def prepare(self, state: CapturedState, identity: Identity) -> None:
        """Have the slots made beside the training, before the first save needs them."""
        slots, needed = self._client.slots, _needed(state, state.describe(identity))
        if slots is None or slots.size < needed:
            with contextlib.suppress(NoSaver):  # the first save finds out
                self._ask(needed)
        else:
            self._touch()

    def begin(
        self, state: CapturedState, identity: Identity, began: float, *, at_once: bool = False
    ) -> None:
        """Take a snapshot and have it persisted; `outcomes` will say what became of it.

        `began` is when training was first held up; with `at_once` it is so until the copy is
        complete, whatever is known of the loop. Waits for the save before. Raises NoSaver.
        """
        self.wait()
        text, at = state.describe(identity), state.size
        slots = self._slots(state, text)
        number = (self._newest + 1) % slots.count

        def done(error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                slots.view(number)[at : at + len(text)] = text
                self._newest = number
                self._deadline = self._patience()
                self._client.send(
                    {
                        "op": "persist",
                        "id": identity.id,
                        "slot": number,
                        "at": at,
                        "length": len(text),
                        "began": began,
                        "blocked": blocked,
                    }
                )
            except device_copy.Changed as changed:
                self._timing = self._timing.after(str(changed))
                reason = (
                    f"{changed} was changed before optimizer.step(), while it was copied; from now"
                    " on the whole state is copied at once"
                )
                self._failed = SaveOutcome(identity.id, False, reason)
            except Exception as other:
                self._failed = SaveOutcome(identity.id, False, f"{type(other).__name__}: {other}")

        self._watch_steps()
        at_once = at_once or self._timing.at_once
        self._take_over(identity.id)
        self._copy = self._copier.copy(state, number, slots.view(number), done, at_once=at_once)
        self._watched = self._timing.watched
        blocked = time.monotonic() - began
        self._copy.start()

    def fence(self) -> None:
        """Return when what a step changes may change: it is copied, and was what was to be saved.

        Called before a step, and before the next save at the latest.
        """
        copy = self._copy
        if copy is None or os.getpid() != self._pid:  # a fork has its own copy of this
            return
        if self._watched:
            self._watched = False
            self._timing = self._timing.after(copy.changed())
        if copy.held:
            copy.wait()
        if copy.complete:
            self._copy = None

    def wait_for_copy(self) -> None:
        """Return when the snapshot is complete and the saver knows of it."""
        self.fence()
        copy = self._copy
        if copy is not None and os.getpid() == self._pid:
            copy.wait()
            self._copy = None

    def _watch_steps(self) -> None:
        """Let every optimizer step, of whatever optimizer, wait for the copy."""
        if self._hook is None:
            this = weakref.ref(self)

            def before_step(*_: object) -> None:
                if (saving := this()) is not None:
                    saving.fence()

            self._hook = register_optimizer_step_pre_hook(before_step)

    def wait(self) -> None:
        """Return when no save is under way."""
        self.wait_for_copy()
        while self._under_way is not None and os.getpid() == self._pid:
            self._poll(BEAT_SECONDS)
            self._alive()

    def _poll(self, seconds: float) -> None:
        """Take in what the saver has to say."""
        if self._failed is not None:
            self._finish(self._failed)
            self._failed = None
        try:
            while self._under_way is not None or self._requested:
                message = self._client.receive(seconds)
                if message is None:
                    self._lose_patience()
                    return
                if message["op"] == "slots":
                    self._requested = 0
                    self._touch()
                elif message["op"] == "saved" and message["id"] == self._under_way:
                    self._finish(
                        SaveOutcome(message["id"], message["ok"], message["reason"], told=True)
                    )
        except NoSaver as error:
            self._requested = 0
            if self._under_way is not None and self._copy is None:
                self._finish(SaveOutcome(self._under_way, False, str(error)))

    def _lose_patience(self) -> None:
        """With a saver that hangs, in the kernel most likely: it gives up by itself if it can."""
        if self._copy is not None:
            return  # the snapshot may not even be complete
        if self._under_way is not None and time.monotonic() > self._deadline:
            id, seconds = self._under_way, self._timeout + PATIENCE
            with contextlib.suppress(NoSaver):  # its slot will be overwritten
                self._client.send({"op": "give_up", "id": id})
            reason = f"{id}: its saver has not answered for {seconds:.0f} s"
            self._finish(SaveOutcome(id, False, reason))

    def _finish(self, outcome: SaveOutcome) -> None:
        if outcome.id == self._under_way:
            self._under_way = None
            self._outcomes.append(outcome)

    def _ask(self, size: int) -> None:
        if not self._client.connected:
            self._hello()
        self._client.send({"op": "slots", "bytes": size, "count": self._count})
        self._requested = size

    def _slots(self, state: CapturedState, text: bytes) -> Slots:
        """Slots with room for `state`, whose description is `text`. Raises NoSaver."""
        while self._requested:
            self._poll(BEAT_SECONDS)
            self._alive()
        slots = self._client.slots
        if slots is None or slots.size < state.size + len(text):
            self._ask(_needed(state, text))
            while self._requested:
                self._poll(BEAT_SECONDS)
                self._alive()
            slots = self._client.slots
        if slots is None or slots.count == 0:
            raise NoSaver(self._client.short or "the saver died")
        return slots

    def _map(self, slots: Slots) -> None:
        self._newest = -1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._pinned = device_copy.pin(slots.view(0), slots.size * slots.count)
        self._touched = False

    def _touch(self) -> None:
        """Beside the training: it takes a tenth of what the first copy would otherwise."""
        slots = self._client.slots
        if slots is not None and not self._touched:
            self._touched = True
            threading.Thread(target=slots.touch, name="touch", daemon=True).start()

    def _unmap(self, slots: Slots) -> None:
        self._copier.forget()
        if self._pinned:
            device_copy.unpin(slots.view(0))
            self._pinned = False


def _needed(state: CapturedState, text: bytes) -> int:
    """Bytes of a slot for states like this one, described in about as many bytes as `text`."""
    least = state.size + 2 * len(text) + SPARE
    # The next attempt describes the same state in a few bytes more or less, and must not give
    # slots back for that, with what is in them.
    return -(-least // ROUND) * ROUND
