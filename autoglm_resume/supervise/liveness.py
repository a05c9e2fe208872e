"""Which ranks have stopped making progress. Pure: beats and `now` go in, ranks come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume.worker.board import Beat, Phase


def hung(beats: Sequence[Beat], now: float, timeout: float, startup: float) -> list[int]:
    """Ranks whose last beat is too old; times in CLOCK_MONOTONIC seconds.

    A rank has `startup` seconds until its first completed step, where compilation and loading
    take their time, and for a save; else `timeout`. A rank without a session never beats after its
    first line, and one that is past its last step owes no more beats: neither is ever hung.
    """
    return [
        rank
        for rank, beat in enumerate(beats)
        if beat.phase not in (Phase.NONE, Phase.DONE)
        and now - beat.time / 1e9 > (timeout if _is_stepping(beat) else startup)
    ]


def _is_stepping(beat: Beat) -> bool:
    # Large checkpoints take minutes, and nothing beats while one is written.
    return bool(beat.first_step_time) and beat.phase is not Phase.SAVE


def agreed_step(beats: Sequence[Beat], step_seconds: float, ahead: float = 0.25) -> int:
    """A step that no rank has passed, a little ahead of all: there all can save without waiting.

    `step_seconds` is the time a step takes now, 0 if unknown; the ranks get `ahead` seconds to
    see the request, which they look for at every step boundary.
    """
    furthest = max((beat.step for beat in beats), default=0)
    return furthest + 2 + (int(ahead / step_seconds) if step_seconds > 0 else 0)


@dataclass
class Pace:
    """How fast steps complete, from looks at the beats."""

    step: int = -1
    since: float = 0.0
    seconds: float = 0.0
    """Of one step, by the last two looks that differed; 0 if unknown."""

    def see(self, step: int, at: float) -> None:
        """Look: the rank had completed `step` steps at monotonic time `at` (of its last beat)."""
        if step > self.step:
            if self.step >= 0:
                self.seconds = (at - self.since) / (step - self.step)
            self.step, self.since = step, at

    @property
    def rate(self) -> float:
        """Steps per second, 0 if unknown."""
        return 1 / self.seconds if self.seconds > 0 else 0.0
