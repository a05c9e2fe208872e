"""Whether an optimizer's groups have the parameters that they had, told by name. Pure.

An optimizer's state knows its parameters by number only. Scripts that make groups of sets number
them anew in every process; scripts that freeze a layer number those behind it anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from autoglm_resume.checkpoint.format.parameters import Group, Member

Order: TypeAlias = "tuple[int, ...]"
"""For each parameter of a group, in order, where it was in the group that was saved."""

_MOST = 8
"""Names in a line."""


def orders(saved: Sequence[Group], now: Sequence[Group]) -> list[Order] | None:
    """One for each group; None where groups have other parameters, or nobody can tell."""
    found = [_order(before, group) for before, group in zip(saved, now, strict=False)]
    if len(saved) != len(now) or None in found:
        return None
    return [order for order in found if order is not None]


def _order(saved: Group, now: Group) -> Order | None:
    if saved == now:
        return tuple(range(len(now)))
    if Counter(saved) != Counter(now):
        return None
    # Equal shapes without names are told by their order, which is not what it was.
    if any(count > 1 for member, count in Counter(now).items() if not isinstance(member, str)):
        return None
    places: dict[Member, deque[int]] = defaultdict(deque)
    for place, member in enumerate(saved):
        places[member].append(place)
    return tuple(places[member].popleft() for member in now)


def differences(saved: Sequence[Group], now: Sequence[Group]) -> list[str]:
    """Readable lines: which groups have other parameters, and which those are."""
    lines = []
    if len(saved) != len(now):
        lines.append(f"expected {len(saved)} groups of parameters, found {len(now)}")
    for nth in range(max(len(saved), len(now))):
        before = saved[nth] if nth < len(saved) else ()
        group = now[nth] if nth < len(now) else ()
        if _order(before, group) is not None:
            continue
        plural = "" if len(before) == 1 else "s"
        line = f"group {nth}: expected {len(before)} parameter{plural}, found {len(group)}"
        gone, new = Counter(before) - Counter(group), Counter(group) - Counter(before)
        if gone:
            line += f"; only in the checkpoint: {listed(map(_called, gone.elements()))}"
        if new:
            line += f"; only in this script: {listed(map(_called, new.elements()))}"
        if not gone and not new:
            line += " in another order, some of which have the same shape and no name"
        lines.append(line)
    return lines


def listed(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    found = list(names)
    more = len(found) - _MOST
    return ", ".join(found[:_MOST]) + (f" and {more} more" if more > 0 else "")


def _called(member: Member) -> str:
    return member if isinstance(member, str) else f"one of shape {list(member)} without a name"
