"""What a program of the zoo is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PAUSE = 0.01
"""Seconds that a step takes at least, so that a kill can be aimed at one."""


@dataclass
class Program:
    """`track` is what the session gets; `step(n)` trains step `n` and says what it saw."""

    track: Mapping[str, Any]
    step: Callable[[int], object]
    steps: int = 30
    stop: Callable[[int], bool] = lambda step: False
    """Whether the script breaks out of its loop after this step."""
    final: Callable[[], object] = lambda: None
    """More that is compared at the end."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Objects that must live as long as the program."""


@dataclass(frozen=True)
class Kind:
    """One program of the zoo: how it is made, with how many ranks, and what it needs."""

    make: Callable[[], Program]
    ranks: int = 1
    needs: tuple[str, ...] = ()
    refused: str = ""
    """A piece of the sentence with which a resume is refused, where that is the right answer."""


ZOO: dict[str, Kind] = {}


def program(
    *, ranks: int = 1, needs: tuple[str, ...] = (), refused: str = ""
) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    """Add a function that makes a program to the zoo, under its name."""

    def add(make: Callable[[], Program]) -> Callable[[], Program]:
        ZOO[make.__name__] = Kind(make, ranks, needs, refused)
        return make

    return add
