"""Where a script stands in its loop over steps, and how it left it.

Python closes an iterator alike when a loop is left by `break` and when an exception passes, and
does not close one that a variable holds. So the frames of the script are looked at: which
instruction each is at, and whether that leads back to the head of the loop.
"""

from __future__ import annotations

import bisect
import dis
import functools
import sys
import weakref
from collections.abc import Callable
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.base import forks
from autoglm_resume.worker.state.strangers import Strangers
from autoglm_resume.worker.state.tracked import TrackedObjects

_NEXT = "FOR_ITER"
_REGULAR = frozenset({"POP_TOP", "POP_ITER", "END_FOR", _NEXT})
"""What a frame is doing that drops the iterator of a loop by `break` or `return`, or because
another iterator of a `zip`, or an `islice`, was at its end."""
_ENDS = frozenset({"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"})
_YIELDS = frozenset({"YIELD_VALUE", "YIELD_FROM", "SEND", "RESUME"})
"""What a generator is at that is closed while it waits to be asked for more."""
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_USUAL = 3
"""Steps in a row that make a habit."""
_FILLERS = frozenset({"EXTENDED_ARG", "NOP", "CACHE", "NOT_TAKEN"})


class Loop:
    """The loop that a script runs over steps; `step` is the one that runs, None before and after.

    Where the iterator is wrapped in others, loops of theirs are among the `_heads`, and do no harm.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.of_epochs = False
        """Whether its bodies are epochs. Then `step` is held back until the end of one."""
        self._counted: int | None = None
        """The last step that the script said to be complete."""
        self._skipped: int | None = None
        """The step before the only one so far, if that was left out."""
        self._passed_over = False
        """Whether the run was resumed behind the steps that were asked for last."""
        self.planned = -1
        """Steps that the script has asked for so far."""
        self._at: tuple[CodeType | None, int] = (None, -1)
        self._heads: list[tuple[CodeType, int]] = []
        """Where each of the loops asks for its next item."""

    def plan(self, total: int, completed: int) -> str:
        """The script asks for the steps up to `total`; returns what is odd about that, if anything.

        Raises UsageError where it asked for them before, and all are complete.
        """
        if total <= min(self.planned, completed):
            raise UsageError(
                f"session.steps({total}) was called before, and all its steps are complete: the "
                "total counts the steps of the whole run",
                hint="for epoch in session.epochs(n), with session.step_done() after each batch;"
                f" or, for {total} steps in each, session.steps((epoch + 1) * {total})",
            )
        self._passed_over = self._counted is None and total < completed
        # Later ones may be the phases of a training that was resumed in the last of them.
        odd = self.planned < 0 and total < completed
        self.planned = max(self.planned, total)
        return (
            f"session.steps({total}): the checkpoint is of step {completed} already" if odd else ""
        )

    def begins_anew(self, total: int, completed: int) -> bool:
        """Whether the steps up to `total` follow others that the run was resumed behind: what a
        script does besides in each of its epochs, it has done again in those.

        Where none is left up to `total`, what follows them is done for the first time.
        """
        return self._passed_over and total >= completed

    def count(self, step: int, completed: int) -> str:
        """The script says that `step` is complete; returns what is odd about that, if anything.

        Raises UsageError where a resume makes that wrong.
        """
        before, self._counted = self._counted, step
        if step < completed:
            raise UsageError(
                f"session.step_done({step}): step {completed - 1} is complete already: steps are"
                " counted over the whole run, and each is done once",
                hint="for an epoch of n steps: step = epoch * n + batch, and after a resume the"
                " first is session.resume()",
            )
        if before is None:
            self._skipped = completed if step == completed + 1 else None
        elif self._skipped is not None and step == before + 1:
            # Who leaves steps out on purpose does not do the very next one.
            first, self._skipped = self._skipped, None
            said = (
                f"session.step_done({before}) was the first, and step {first} was never done: steps"
                " are counted from 0, for step in range(session.resume(), total)"
            )
            if first:
                raise UsageError(said, hint="call step_done for a step that is left out, too")
            return f"{said}; where a loop counts from 1, every resume leaves a step out"
        else:
            self._skipped = None
        return ""

    def enter(self, step: int, asked: FrameType | None) -> None:
        """The body of the loop begins with `step`, for which the frame `asked` has asked."""
        self.step, self.of_epochs = step, False
        at = (asked.f_code, asked.f_lasti) if asked else (None, -1)
        if at == self._at:
            return
        self._at, self._heads = at, []
        while asked is not None:
            offset, name = _instruction(asked)
            if name != _NEXT:
                break
            self._heads.append((asked.f_code, offset))
            asked = asked.f_back

    def enter_epoch(self, asked: FrameType | None) -> None:
        """The same of a loop over epochs, in which no step runs yet."""
        self.enter(0, asked)
        self.left()
        self.of_epochs = True

    def left(self) -> None:
        """No step runs any more."""
        self.step = None

    def unwinds(self, frame: FrameType | None) -> bool:
        """Whether an exception drops the iterator: in a loop's own frame, or when none is left.

        What somebody held is dropped elsewhere, when the loop is long over.
        """
        loops = [self._at[0], *(code for code, _ in self._heads)]
        return frame is None or any(frame.f_code is code for code in loops)

    def goes_on(self, frame: FrameType | None) -> bool:
        """Whether a step runs, and from where `frame` is the loop may go on to the next."""
        while self.step is not None and frame is not None:
            at, _ = _instruction(frame)
            if any(c is frame.f_code and _leads_to(c, at, head) for c, head in self._heads):
                return True
            frame = frame.f_back
        return False


class Watched:
    """Around a loop in a generator: calls `dropped` with the script's frame if that drops it."""

    def __init__(self, dropped: Callable[[FrameType | None], None]) -> None:
        self._dropped = dropped

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # At the end of the interpreter modules may be gone already.
        over = kind is not GeneratorExit or not sys or sys.is_finalizing()
        if not over and not forks.is_helper():
            self._dropped(_dropper(sys._getframe(1).f_back))


def _dropper(frame: FrameType | None) -> FrameType | None:
    """Who dropped the iterator that was dropped in `frame`: a generator that stands at its own
    `yield` was itself dropped by another.
    """
    while frame is not None and frame.f_code.co_flags & CO_GENERATOR:
        if _instruction(frame)[1] not in _YIELDS:
            break
        frame = frame.f_back
    return frame


def regularly(frame: FrameType | None) -> bool:
    """Whether `frame`, in which an iterator was dropped, has left its loop by its own will."""
    return frame is not None and _instruction(frame)[1] in _REGULAR


def _instruction(frame: FrameType) -> tuple[int, str]:
    """Offset and name of that which `frame` is at."""
    # Python may be at what it keeps behind an instruction, or at the prefix of a long one.
    offsets, instructions = _instructions(frame.f_code)
    at = max(0, bisect.bisect(offsets, frame.f_lasti) - 1)
    while instructions[at].opname == "EXTENDED_ARG":
        at += 1
    return offsets[at], instructions[at].opname


@functools.lru_cache(maxsize=8)
def _instructions(code: CodeType) -> tuple[list[int], list[dis.Instruction]]:
    found = list(dis.get_instructions(code))
    return [each.offset for each in found], found


@functools.lru_cache(maxsize=64)
def _leads_to(code: CodeType, start: int, head: int) -> bool:
    """Whether what follows the instruction at `start` may come to the one at `head`, and not by
    beginning that loop anew.

    Where an instruction lies says nothing: the compiler copies what follows a `break` into a loop.
    """
    offsets, instructions = _instructions(code)
    before = offsets.index(head) - 1
    while before >= 0 and instructions[before].opname in _FILLERS:
        before -= 1
    seen, queue = {before}, _after(instructions, offsets.index(start), offsets)
    while queue:
        at = queue.pop()
        if offsets[at] == head:
            return True
        if at not in seen:
            seen.add(at)
            queue += _after(instructions, at, offsets)
    return False


def _after(instructions: list[dis.Instruction], at: int, offsets: list[int]) -> list[int]:
    """Indices of the instructions that may follow the one at `at`."""
    this, following = instructions[at], []
    if this.opcode in _JUMPS:
        following.append(bisect.bisect_left(offsets, this.argval))
    always = this.opcode in _JUMPS and this.opname.startswith(("JUMP_FORWARD", "JUMP_BACKWARD"))
    if not (always or this.opname in (*_ENDS, "JUMP_ABSOLUTE")):
        following.append(at + 1)
    return [each for each in following if each < len(instructions)]


class Updates:
    """Whether the step that runs has done its work, as far as passes and optimizers tell.

    Any optimizer counts where none is tracked: it may be in an object of the script's own.
    """

    def __init__(self, tracked: TrackedObjects, say: Callable[[str], None]) -> None:
        self.seen = False
        """Whether a tracked optimizer has stepped since the last step was complete."""
        self._gradients = tracked.gradients
        self._strangers = Strangers(tracked.objects, say)
        self._passes = 0
        """For training, before the last step was complete."""
        self._silent: int | None = None
        """Steps that were complete since one in which there was an optimizer's step or a pass;
        None before the first step."""
        self._ever = False
        """Whether there was such a step."""
        self._passing = False
        """Whether a step was complete with passes alone."""
        self._tracked: list[Optimizer] = []
        this = weakref.ref(self)

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            if (updates := this()) is not None and not torch.compiler.is_compiling():
                updates._stepped(optimizer)

        self._hook = register_optimizer_step_post_hook(stepped)

    def track(self, obj: object) -> None:
        """The script tracks `obj`."""
        if isinstance(obj, Optimizer):
            self._tracked.append(obj)

    def _stepped(self, optimizer: Optimizer) -> None:
        tracked = self._tracked
        if not any(optimizer is each for each in tracked):
            self._strangers.stepped(optimizer)
            self.seen |= not tracked
        else:
            self.seen = True
        self._gradients.stepped(optimizer)

    def begin(self) -> None:
        """The first step begins: some make an optimizer's state before."""
        self.seen, self._passes = False, self._gradients.passes

    def step_done(self) -> None:
        """A step is complete."""
        passed = self._gradients.passes != self._passes
        if self.seen or passed:
            self._ever, self._silent = True, 0
        else:
            self._silent = (self._silent or 0) + 1
        self._passing |= passed and not self.seen
        known = len(self._tracked)
        self._strangers.step_done(tracked=known, stepped=self.seen and known > 0)
        self._gradients.step_done()
        self.begin()

    @property
    def complete(self) -> bool:
        """Whether the step that runs has done its work.

        Where gradients accumulate, a pass is the work of a step. Parameters may be changed without
        any of both, or by a CUDA graph that runs no hooks: if steps before were complete without,
        so is this one. A step now and then that leaves its batch out says nothing.
        """
        if self.seen or self._silent is None:
            return self.seen
        if self._gradients.passes != self._passes:
            return self._passing
        return self._silent >= (_USUAL if self._ever else 1)
