"""Where a script stands in its loop over steps, and how it left it.

Python closes an iterator alike when a loop is left by `break` and when an exception passes, and
does not close one that a variable holds. So the frames of the script are looked at: which
instruction each is at.
"""

from __future__ import annotations

import dis
import functools
import weakref
from types import CodeType, FrameType
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from autoglm_resume.errors import UsageError

_NEXT = "FOR_ITER"
_REGULAR = frozenset({"POP_TOP", "POP_ITER", "END_FOR", _NEXT})
"""What a frame is doing that drops the iterator of a loop by `break` or `return`, or because
another iterator of a `zip`, or an `islice`, was at its end."""


class Loop:
    """The loop that a script runs over steps; `step` is the one that runs, None before and after.

    Where the iterator is wrapped in others, loops of theirs are among `_bodies`, and do no harm.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._planned = -1
        """Steps that the script has asked for so far."""
        self._at: tuple[CodeType | None, int] = (None, -1)
        self._bodies: list[tuple[CodeType, range]] = []

    def plan(self, total: int, completed: int) -> str:
        """The script asks for the steps up to `total`; returns what is odd about that, if anything.

        Raises UsageError where it asked for them before, and all are complete.
        """
        if total <= min(self._planned, completed):
            raise UsageError(
                f"session.steps({total}) was called before, and all its steps are complete: the "
                "total counts the steps of the whole run",
                hint=f"for {total} steps in each epoch: session.steps((epoch + 1) * {total})",
            )
        # Later ones may be the phases of a training that was resumed in the last of them.
        odd = self._planned < 0 and total < completed
        self._planned = max(self._planned, total)
        return (
            f"session.steps({total}): the checkpoint is of step {completed} already" if odd else ""
        )

    def enter(self, step: int, asked: FrameType | None) -> None:
        """The body of the loop begins with `step`, for which the frame `asked` has asked."""
        self.step = step
        at = (asked.f_code, asked.f_lasti) if asked else (None, -1)
        if at == self._at:
            return
        self._at, self._bodies = at, []
        while asked is not None:
            name, end = _instruction(asked)
            if name != _NEXT:
                break
            self._bodies.append((asked.f_code, range(asked.f_lasti, end)))
            asked = asked.f_back

    def left(self) -> None:
        """No step runs any more."""
        self.step = None

    def has(self, frame: FrameType | None) -> bool:
        """Whether a step runs, and `frame` was called from the body of the loop."""
        while self.step is not None and frame is not None:
            if any(frame.f_code is code and frame.f_lasti in body for code, body in self._bodies):
                return True
            frame = frame.f_back
        return False


def regularly(frame: FrameType | None) -> bool:
    """Whether `frame`, in which an iterator was dropped, has left its loop by its own will."""
    return frame is not None and _instruction(frame)[0] in _REGULAR


def _instruction(frame: FrameType) -> tuple[str, int]:
    """That it is at: the name, and of a jump where it leads."""
    return _instructions(frame.f_code).get(frame.f_lasti, ("", 0))


@functools.lru_cache(maxsize=8)
def _instructions(code: CodeType) -> dict[int, tuple[str, int]]:
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return {
        each.offset: (each.opname, each.argval if each.opcode in jumps else 0)
        for each in dis.get_instructions(code)
    }


class Updates:
    """Whether a tracked optimizer has stepped since the last step was complete.

    Any optimizer counts where none is tracked: it may be in an object of the script's own.
    """

    def __init__(self) -> None:
        self.seen = False
        self._usual: bool | None = None
        self._tracked: list[Optimizer] = []
        this = weakref.ref(self)

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            if (updates := this()) is not None:
                tracked = updates._tracked
                updates.seen |= not tracked or any(optimizer is each for each in tracked)

        self._hook = register_optimizer_step_post_hook(stepped)

    def track(self, obj: object) -> None:
        """The script tracks `obj`."""
        if isinstance(obj, Optimizer):
            self._tracked.append(obj)

    def step_done(self) -> None:
        """A step is complete."""
        self._usual, self.seen = self.seen, False

    @property
    def complete(self) -> bool:
        """Whether the step that runs has done its work.

        Parameters may be changed without any optimizer, or by a CUDA graph that runs no hooks: if
        the step before was complete without one, so is this one.
        """
        return self.seen or self._usual is False
