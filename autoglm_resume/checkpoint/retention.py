"""Which checkpoints may go. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def doomed(
    committed: Sequence[tuple[str, int]], keep_last: int, protected: frozenset[str]
) -> list[str]:
    """Ids to delete, oldest first.

    `committed` holds (id, step), newest first. Only what is committed counts as kept, so broken
    checkpoints never push out a good one; the newest and the `protected` ids always stay.
    """
    beyond = committed[max(1, keep_last) :]
    return [name for name, _ in reversed(beyond) if name not in protected]
