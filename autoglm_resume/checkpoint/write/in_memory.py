"""A checkpoint that is only in memory yet: every rank's snapshot, and a digest that seals each.

A saver digests all chunks before it writes any. When ranks die while their checkpoint is being
written, the next ones need not wait for that: what they copy out of memory is what will be on
storage, if it has the same digests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm_resume.checkpoint.chunks.cut import items_of
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.snapshot import Snapshot, describe
from autoglm_resume.checkpoint.format.structure import combined
from autoglm_resume.checkpoint.format.tables import Fingerprint, Pack
from autoglm_resume.checkpoint.write.part_writer import part_of
from autoglm_resume.checkpoint.write.reuse import ChunkTable

_NOWHERE = Fingerprint(0, 0, 0, 0)


@dataclass(frozen=True)
class Sealed:
    """What the gate needs to know; `seals` are those of all ranks, in order."""

    id: str
    created: float
    model_hash: str | None
    raw: int
    seals: tuple[str, ...]

    @property
    def step(self) -> int:
        return step_of(self.id)

    @classmethod
    def of(cls, snapshots: Sequence[Mapping[str, Any] | None]) -> Sealed | None:
        """What all ranks have, by each one's `sealed_snapshot`; None if that is not the same."""
        found = [each for each in snapshots if each is not None]
        kinds = {(each["id"], each["world_size"]) for each in found}
        if (
            len(found) < len(snapshots)
            or len(kinds) != 1
            or found[0]["world_size"] != len(snapshots)
        ):
            return None
        hashes = [each["model_hash"] for each in found if each["model_hash"]]
        return cls(
            id=found[0]["id"],
            created=max(each["created"] for each in found),
            model_hash=combined(hashes) if hashes else None,
            raw=sum(each["raw"] for each in found),
            seals=tuple(each["seal"] for each in found),
        )


def sealed_snapshot(snapshot: Snapshot, names: Sequence[str]) -> dict[str, Any]:
    """That one rank has `snapshot`, whose chunks have the digests `names`; for a message."""
    return {
        "id": snapshot.id,
        "created": snapshot.created,
        "world_size": snapshot.world_size,
        "model_hash": snapshot.model.hash if snapshot.model else None,
        "raw": snapshot.nbytes,
        "seal": seal(snapshot, names),
    }


def seal(snapshot: Snapshot, names: Sequence[str]) -> str:
    """One digest of a snapshot whose chunks, in order, have the digests `names`."""
    return digest(describe(snapshot) + "".join(names).encode())


def part_in_memory(snapshot: Snapshot, names: Sequence[str]) -> Part:
    """As it would be on storage, with its chunks nowhere."""
    table = ChunkTable(snapshot.id, None)
    rows: dict[tuple[str, int], int] = {}
    for item, name in zip(items_of(snapshot), names, strict=True):
        known = table.find(name)
        row = table.peers(name, len(item.raw)) if known is None else known
        rows[item.position] = row
    return part_of(snapshot, table, Pack(snapshot.id, _NOWHERE), rows)
