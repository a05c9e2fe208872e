"""A rank's saves: a snapshot into shared memory beside the training, and on to the saver.

Parameters and optimizer state cannot change before the next `optimizer.step()`, but for one thing:
an evaluation may swap averaged weights in and out behind autograd's back. So they are copied by a
thread, and a hook before the step waits for it (`fence`). Where such a swap was noticed, or could
not be (on a device), the thread waits for the next forward pass for training; where that does not
help, everything is copied at once, as is whatever may change earlier (see `When`).
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoglm_resume.checkpoint.format.snapshot import Snapshot, describe, from_slot, layout
from autoglm_resume.checkpoint.state.capture import CapturedState, Identity
from autoglm_resume.protocol.saver_messages import Message
from autoglm_resume.protocol.shared_memory import Slots
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.saving import device_copy
from autoglm_resume.worker.saving.saver_client import NoSaver, SaverClient

ROUND = 1 << 20
SPARE = 1 << 16
"""Bytes by which the description of a snapshot may grow, beyond twice its size."""
PATIENCE = 30.0
"""Seconds after `checkpoint.timeout` in which a saver must answer."""
BEAT_SECONDS = 1.0
"""Between two beats while waiting for the saver."""

__all__ = ["NoSaver", "SaveOutcome", "Stager"]


class When(enum.IntEnum):
    """When the copy of what only a step changes begins."""

    NOW = 0
    NEXT_PASS = 1
    AT_ONCE = 2
    """And training waits for it."""


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
        self._when = When.NOW
        self._pid = os.getpid()
        self._targets: dict[int, tuple[object, list[torch.Tensor]]] = {}
        self._hook: object = None
        self._pinned = False
        self._touched = False
        self._newest = -1
        self._spare = SPARE
        self._requested = 0
        # A saver of the supervisor's goes on without this process.
        atexit.register(self.wait if name is None else self.fence)

    @property
    def short(self) -> str:
        """Why there are fewer slots than were asked for, if so."""
        return self._client.short

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
        slots, needed = self._client.slots, self._needed(state, identity)
        if slots is None or slots.size < needed:
            with contextlib.suppress(NoSaver):  # the first save finds out
                self._ask(needed)
        else:
            self._touch()

    def begin(
        self, state: CapturedState, identity: Identity, safe: frozenset[int], began: float
    ) -> None:
        """Take a snapshot and have it persisted; `outcomes` will say what became of it.

        `safe` are the data pointers of tensors that only an optimizer step changes; `began` is
        when training was first held up. Waits for the save before. Raises NoSaver.
        """
        self.wait()
        _, at = layout(state.sizes())
        slots = self._slots(state, identity, at)
        number = (self._newest + 1) % slots.count
        if self._when is When.NOW and any(t.device.type != "cpu" for _, t in state.tensors):
            self._when = When.NEXT_PASS
        into = self._into(state, number, slots)

        def done(error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                text = describe(state.snapshot(identity))
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
                self._when = When(min(self._when + 1, When.AT_ONCE))
                later = (
                    "copied at once"
                    if self._when is When.AT_ONCE
                    else "copied during the next forward and backward pass"
                )
                reason = (
                    f"{changed} was changed before optimizer.step(), while it was copied; from now"
                    f" on the state is {later}"
                )
                self._failed = SaveOutcome(identity.id, False, reason)
            except Exception as other:
                if isinstance(other, ValueError):  # its description has outgrown the slot
                    self._spare *= 2
                self._failed = SaveOutcome(identity.id, False, f"{type(other).__name__}: {other}")

        self._watch_steps()
        if self._when is When.AT_ONCE:
            safe = frozenset()
        self._copy = self._copier.copy(state.tensors, into, safe, done)
        self._take_over(identity.id)
        blocked = time.monotonic() - began
        if self._when is not When.NEXT_PASS:
            self._copy.start()

    def start_copy(self) -> None:
        """A forward pass for training begins: nothing changes until the optimizer's step."""
        if self._copy is not None and os.getpid() == self._pid:
            self._copy.start()

    def fence(self) -> None:
        """Return when the copy is complete: what it copied may change now."""
        copy = self._copy
        if copy is not None and os.getpid() == self._pid:  # a fork has its own copy of this
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
        self.fence()
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

    def _needed(self, state: CapturedState, identity: Identity) -> int:
        _, at = layout(state.sizes())
        least = at + 2 * len(describe(state.snapshot(identity))) + self._spare
        # The next attempt describes the same state in a few bytes more or less, and must not give
        # slots back for that, with what is in them.
        return -(-least // ROUND) * ROUND

    def _ask(self, size: int) -> None:
        if not self._client.connected:
            self._hello()
        self._client.send({"op": "slots", "bytes": size, "count": self._count})
        self._requested = size

    def _slots(self, state: CapturedState, identity: Identity, at: int) -> Slots:
        """Slots with room for `at` bytes of tensors and a description. Raises NoSaver."""
        while self._requested:
            self._poll(BEAT_SECONDS)
            self._alive()
        slots = self._client.slots
        if slots is None or slots.size < at + self._spare:
            self._ask(self._needed(state, identity))
            while self._requested:
                self._poll(BEAT_SECONDS)
                self._alive()
            slots = self._client.slots
        if slots is None or slots.count == 0:
            raise NoSaver(self._client.short or "the saver died")
        return slots

    def _into(self, state: CapturedState, number: int, slots: Slots) -> list[torch.Tensor]:
        """Views of the slot as tensors; made once for as long as nothing changes its shape."""
        shapes = [(tensor.dtype, tensor.shape) for _, tensor in state.tensors]
        known = self._targets.get(number)
        if known is None or known[0] != shapes:
            known = self._targets[number] = (
                shapes,
                device_copy.targets(state.tensors, slots.view(number)),
            )
        return known[1]

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
        self._targets.clear()
        if self._pinned:
            device_copy.unpin(slots.view(0))
            self._pinned = False
