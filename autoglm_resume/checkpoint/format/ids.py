"""Ids of checkpoints: `step-0000000030.a1` is what attempt 1 saved at step 30. Pure.

What a script without a supervisor has saved has a word in place of the attempt, or behind it: in
the directory of a run, it is an attempt after the run's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_ID = re.compile(r"step-(\d{10,18})\.([a-z0-9]{1,64})\Z")
_ATTEMPT = re.compile(r"a(\d+)(?:x[0-9a-f]+)?\Z")


class Branch(NamedTuple):
    """Where a run went back on purpose, and left newer checkpoints behind."""

    step: int
    """Of the checkpoint that it went on from."""
    attempt: int
    """The first to go on from there; what earlier ones saved after `step` was given up."""


def checkpoint_id(step: int, token: str) -> str:
    """`step` counts completed optimizer steps; `token` is `a<attempt>`, a word, or both."""
    name = f"step-{step:010d}.{token}"
    if not _ID.match(name):
        raise ValueError(f"no checkpoint id from step {step!r} and token {token!r}")
    return name


def again(token: str, count: int) -> str:
    """The token of what is saved once more at the same step; with a larger `count` it is newer."""
    return f"{token}{'' if 'x' in token else 'x'}{count:04x}" if count else token


def is_id(name: str) -> bool:
    """Whether `name` is a checkpoint id."""
    return _ID.match(name) is not None


def step_of(id: str) -> int:
    """Raises ValueError when it is not an id, as all below do."""
    return recency(id)[0]


def attempt_of(id: str) -> int:
    """The attempt that saved it, -1 where that was none of a run."""
    return recency(id)[1]


def recency(id: str) -> tuple[int, int, str]:
    """Sort key: larger is newer. By the step, then by the attempt."""
    match = _ID.match(id)
    if match is None:
        raise ValueError(f"{id!r} is not a checkpoint id")
    step, token = match.groups()
    attempt = _ATTEMPT.match(token)
    return int(step), int(attempt[1]) if attempt else -1, token


def newer(id: str, other: str) -> bool:
    """Whether `id` is newer than `other`."""
    return recency(id) > recency(other)


def newest_first(ids: Iterable[str]) -> list[str]:
    """Sorted."""
    return sorted(ids, key=recency, reverse=True)
