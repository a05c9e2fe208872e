"""What a new part may take from the one before it: identical chunks, and bases of deltas. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk, Pack


@dataclass(frozen=True)
class PreviousPart:
    """This rank's part of the last committed checkpoint, and its tensors while in memory."""

    part: Part
    tensors: Mapping[str, memoryview] = field(default_factory=dict, repr=False)


WORTHWHILE = 0.1
"""Of a pack, what must be shared to be taken from it: whatever is taken keeps its checkpoint, which
could be deleted otherwise."""


class Sharing:
    """What a part with chunks of these digests may take from `previous`.

    It will need at most `limit` other checkpoints. One that would come to need more is a keyframe:
    it holds no delta, and takes identical chunks only from those that hold most of them.
    """

    def __init__(
        self,
        previous: PreviousPart | None,
        limit: int,
        names: Collection[str],
        *,
        deltas: bool = False,
    ) -> None:
        """With `deltas`, the part before is needed anyway, and so is all that it needs."""
        self._previous = previous
        self._by_digest: dict[str, int] = {}
        self._positions: dict[tuple[str, int], int] = {}
        self.keyframe = previous is None or len(previous.part.packs) > limit
        if previous is None:
            return
        part = previous.part
        same = [
            index
            for index, chunk in enumerate(part.chunks)
            if chunk.digest in names and chunk.pack is not None
        ]
        if self.keyframe:
            same = [index for index in same if part.chunks[index].base is None]
        donors = _donors(part, same, max(1, limit // 2) if self.keyframe else limit)
        if deltas and not self.keyframe:
            donors = set(range(len(part.packs)))
        for index in same:
            if _packs(part, index) <= donors:
                self._by_digest[part.chunks[index].digest] = index
        if not self.keyframe:
            for tensor in part.tensors:
                for nth, index in enumerate(tensor.chunks):
                    if part.chunks[index].pack is not None:
                        self._positions[tensor.name, nth] = index

    def identical(self, name: str) -> int | None:
        """Index, in the part before, of the chunk with digest `name`."""
        return self._by_digest.get(name)

    def base(self, tensor: str, nth: int, size: int) -> tuple[int, memoryview] | None:
        """Index, in the part before, of chunk `nth` of `tensor`, and its bytes, as stored."""
        index = self._positions.get((tensor, nth))
        if index is None or self._previous is None or tensor not in self._previous.tensors:
            return None
        start = nth * CHUNK_BYTES
        raw = self._previous.tensors[tensor][start : start + size]
        chunk = self._previous.part.chunks[index]
        return (index, raw) if chunk.raw == size and digest(raw) == chunk.digest else None


def _donors(part: Part, same: Sequence[int], limit: int) -> set[int]:
    """The packs from which it is worth while to take the chunks `same`, at most `limit`."""
    shared = Counter[int]()
    for index in same:
        for pack in _packs(part, index):
            shared[pack] += part.chunks[index].stored
    worth = [p for p, n in shared.items() if n >= WORTHWHILE * part.packs[p].fingerprint.size]
    return set(sorted(worth, key=lambda pack: -shared[pack])[:limit])


def _packs(part: Part, index: int | None) -> set[int]:
    """All packs that decoding a chunk takes."""
    found: set[int] = set()
    while index is not None:
        chunk = part.chunks[index]
        if chunk.pack is not None:
            found.add(chunk.pack)
        index = chunk.base
    return found


class ChunkTable:
    """The chunk table of a part as it grows.

    Equal chunks are in it once, except for bases: they must be those in an older pack.
    """

    def __init__(self, id: str, previous: PreviousPart | None) -> None:
        self._id = id
        self._previous = previous.part if previous else None
        self._rows: list[tuple[Chunk, str | None]] = []
        self._index: dict[str, int] = {}
        self._taken: dict[int, int] = {}
        self.end = 0
        """Bytes of the part's own pack so far."""

    def find(self, name: str) -> int | None:
        """Index of the chunk with digest `name`."""
        return self._index.get(name)

    def own(
        self, name: str, raw: int, stored: int, codec: str, base: int | None
    ) -> tuple[int, Chunk]:
        """A chunk that follows in the part's own pack; `base` is an index in the part before."""
        row = None if base is None else self.take(base)
        chunk = Chunk(name, raw, 0, stored, self.end, codec, row)
        self.end += stored
        return self._add(chunk, self._id), chunk

    def take(self, index: int) -> int:
        """A chunk of the part before, and its bases."""
        assert self._previous is not None
        if index in self._taken:
            return self._taken[index]
        chunk = self._previous.chunks[index]
        assert chunk.pack is not None
        base = None if chunk.base is None else self.take(chunk.base)
        taken = Chunk(
            chunk.digest, chunk.raw, chunk.pack, chunk.stored, chunk.offset, chunk.codec, base
        )
        row = self._taken[index] = self._add(taken, self._previous.packs[chunk.pack].id)
        return row

    def peers(self, name: str, raw: int) -> int:
        """A chunk that another rank stores."""
        return self._add(Chunk(name, raw, None), None)

    def cast(self, name: str, raw: int, dtype: str, sources: tuple[int, ...]) -> int:
        """A chunk that need not be stored: the cast of the chunks at `sources`, to `dtype`.

        Add casts last: a chunk that is stored all the same, as one of `sources` may be if all of
        them are zeros, must be found by its digest, here and by other ranks.
        """
        known = self.find(name)
        if known is not None:
            return known
        return self._add(Chunk(name, raw, None, codec=dtype, cast_of=sources), None)

    def _add(self, chunk: Chunk, pack: str | None) -> int:
        self._index[chunk.digest] = len(self._rows)
        self._rows.append((chunk, pack))
        return len(self._rows) - 1

    def finish(self, own: Pack) -> tuple[tuple[Pack, ...], tuple[Chunk, ...]]:
        """All packs and chunks; the part's own pack is on storage by now."""
        used = {pack for _, pack in self._rows}
        older = self._previous.packs if self._previous else ()
        packs = (own, *(pack for pack in older if pack.id in used))
        order = {pack.id: index for index, pack in enumerate(packs)}
        chunks = tuple(
            Chunk(c.digest, c.raw, order[pack], c.stored, c.offset, c.codec, c.base)
            if pack is not None
            else c
            for c, pack in self._rows
        )
        return packs, chunks
