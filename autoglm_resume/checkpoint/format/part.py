"""A part: one rank's share of a checkpoint, as the JSON document beside its pack. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from autoglm_resume.checkpoint.format.document import (
    Json,
    JsonNode,
    compact,
    digest_of_digests,
    parse,
)
from autoglm_resume.checkpoint.format.ids import is_id, newest_first, step_of
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.format.parameters import Parameters
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.format.tables import (
    CAST_FACTOR,
    CHUNK_BYTES,
    Chunk,
    Fingerprint,
    Pack,
    Tensor,
    object_digest,
    object_of,
    read_chunk,
    read_pack,
    read_tensor,
)
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, NewerFormat

FORMAT = 2

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


_OWN = re.compile(r"(?:rank-\d{5,}\.(?:json|pack)|manifest\.json|reason\.json)\Z")


def is_own(name: str) -> bool:
    """Whether a file of this name in a checkpoint's directory is of the format, and no stranger."""
    return _OWN.match(name) is not None


def part_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def pack_file(rank: int) -> str:
    return f"rank-{rank:05d}.pack"


@dataclass(frozen=True)
class Part:
    """One rank's share. `state` maps each object of `objects` to its tree (see state/tree.py).

    `packs` begins with the part's own; then come those it needs, newest first.
    """

    id: str
    step: int
    rank: int
    world_size: int
    lineage: tuple[str, ...]
    created: float
    versions: Mapping[str, str]
    model: Structure | None
    objects: Mapping[str, str]
    state: Mapping[str, Json]
    tensors: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    packs: tuple[Pack, ...]
    rng: bool
    data: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the script reported of this step, such as its loss."""
    origin: Origin | None = None
    """None where an older version wrote it."""
    parameters: Parameters | None = None
    """None in checkpoints of older versions."""
    format: int = FORMAT

    @cached_property
    def raw(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def pack(self) -> str:
        """File name of its own pack, and of this rank's packs in other checkpoints."""
        return pack_file(self.rank)

    @property
    def fingerprint(self) -> Fingerprint:
        """Of its own pack."""
        return self.packs[0].fingerprint

    @property
    def stored(self) -> int:
        """Bytes of its own pack."""
        return self.fingerprint.size

    @property
    def shared(self) -> int:
        """Stored bytes it needs in older packs."""
        return sum(chunk.stored for chunk in self.chunks if chunk.pack)

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the older checkpoints whose packs it needs, newest first."""
        return tuple(pack.id for pack in self.packs[1:])

    def encode(self) -> bytes:
        """The part's document."""
        return compact(
            {
                "format": self.format,
                "id": self.id,
                "step": self.step,
                "rank": self.rank,
                "world_size": self.world_size,
                "lineage": list(self.lineage),
                "created": self.created,
                "versions": dict(self.versions),
                "model": self.model.to_json() if self.model else None,
                "objects": dict(self.objects),
                "rng": self.rng,
                "data": self.data,
                "metrics": dict(self.metrics),
                **({"origin": self.origin.to_json()} if self.origin else {}),
                "parameters": self.parameters.to_json() if self.parameters else None,
                "packs": [asdict(pack) for pack in self.packs],
                "state": dict(self.state),
                "tensors": [asdict(tensor) for tensor in self.tensors],
                "chunks": [list(vars(chunk).values()) for chunk in self.chunks],
            }
        )

    @classmethod
    def decode(cls, data: bytes, file: str) -> Part:
        """Raises CorruptCheckpoint or NewerFormat, naming `file`."""
        node = parse(data, file)
        check_format(node)
        part = cls(
            **identity(node),
            rank=node["rank"].whole(),
            lineage=tuple(entry.text() for entry in node["lineage"].items()),
            model=Structure.from_node(m) if (m := node["model"].optional()) else None,
            objects=node["objects"].digests(),
            state={name: tree.value for name, tree in node["state"].members().items()},
            tensors=tuple(map(read_tensor, node["tensors"].items())),
            chunks=tuple(map(read_chunk, node["chunks"].items())),
            packs=tuple(map(read_pack, node["packs"].items())),
            metrics=node["metrics"].numbers(),
            origin=Origin.from_node(o) if (o := node["origin"].optional()) else None,
            parameters=Parameters.from_node(p) if (p := node["parameters"].optional()) else None,
        )
        _check(part, node)
        return part


def check_format(node: JsonNode) -> None:
    found = node["format"].whole(1)
    if found < FORMAT:
        # Format 1 was never released.
        raise CheckpointError(f"{node.file}: expected format {FORMAT}, found format {found}")
    if found > FORMAT:
        raise NewerFormat(
            f"{node.file}: format {found}, this version reads up to format {FORMAT}",
            hint="upgrade autoglm-resume to the version that wrote the checkpoint",
        )


def identity(node: JsonNode) -> dict[str, Json]:
    """The fields that a part and its manifest share, checked."""
    name = node["id"].text()
    if not is_id(name):
        node["id"].fail("a checkpoint id")
    if node["step"].whole() != (step := step_of(name)):
        node["step"].fail(f"step {step} as in the id")
    return {
        "id": name,
        "step": step,
        "world_size": node["world_size"].whole(1),
        "created": node["created"].seconds(),
        "versions": node["versions"].texts(),
        "rng": node["rng"].flag(),
        "data": node["data"].flag(),
    }


def _check(part: Part, node: JsonNode) -> None:
    """Every reference from one table of the document to another."""

    def expect(what: str, expected: object, found: object) -> None:
        if expected != found:
            raise CorruptCheckpoint(f"{node.file}: {what}: expected {expected}, found {found}")

    if part.rank >= part.world_size:
        node["rank"].fail(f"a rank below {part.world_size}")
    for entry in part.lineage:
        if not is_id(entry) or entry == part.id:
            node["lineage"].fail("ids of other checkpoints")
    expect("its own pack", part.id, part.packs[0].id if part.packs else None)
    ids = [pack.id for pack in part.packs]
    expect("packs, newest first", newest_first(set(ids)), ids)
    end = 0
    for index, chunk in enumerate(part.chunks):
        if chunk.raw > CHUNK_BYTES:
            expect(f"chunk {index}: raw size", f"at most {CHUNK_BYTES}", chunk.raw)
        if chunk.stored > CHUNK_BYTES:  # what does not get smaller is stored raw
            expect(f"chunk {index}: stored size", f"at most {CHUNK_BYTES}", chunk.stored)
        if chunk.pack == 0:
            expect(f"chunk {index}: offset", end, chunk.offset)
            end += chunk.stored
        elif chunk.pack is not None:
            if chunk.pack >= len(part.packs):
                expect(f"chunk {index}: pack", f"below {len(part.packs)}", chunk.pack)
            size = part.packs[chunk.pack].fingerprint.size
            if chunk.offset + chunk.stored > size:
                expect(f"chunk {index}: end", f"at most {size}", chunk.offset + chunk.stored)
        if chunk.base is not None:
            expect(f"chunk {index}: base", "one in an older pack", _base_of(part.chunks, chunk))
        if chunk.cast_of:
            expect(f"chunk {index}: cast", *_cast_of(part.chunks, chunk))
    expect("size of the pack", end, part.packs[0].fingerprint.size)

    used: set[int] = set()
    for tensor in part.tensors:
        if tensor.chunks and max(tensor.chunks) >= len(part.chunks):
            expect(f"{tensor.name}: chunks", f"below {len(part.chunks)}", max(tensor.chunks))
        used.update(tensor.chunks)
        size = tensor.nbytes
        raw = sum(part.chunks[index].raw for index in tensor.chunks)
        expect(f"{tensor.name}: bytes", size, raw)
        expect(f"{tensor.name}: chunks", -(-size // CHUNK_BYTES), len(tensor.chunks))
        for index in tensor.chunks:
            raw = part.chunks[index].raw
            if raw != min(CHUNK_BYTES, size):
                expect(f"{tensor.name}: chunk {index}: raw size", min(CHUNK_BYTES, size), raw)
            size -= raw
        expect(
            f"{tensor.name}: digest",
            digest_of_digests(part.chunks[index].digest for index in tensor.chunks),
            tensor.digest,
        )
    used.update(chunk.base for chunk in part.chunks if chunk.base is not None)
    used.update(source for chunk in part.chunks for source in chunk.cast_of)
    expect("chunks in use", len(part.chunks), len(used))
    names = [tensor.name for tensor in part.tensors]
    expect("different tensor names", len(names), len(set(names)))

    expect("objects in the state", sorted(part.objects), sorted(part.state))
    tables: dict[str, list[Tensor]] = {name: [] for name in part.objects}
    for tensor in part.tensors:
        if object_of(tensor.name) not in tables:
            expect(f"{tensor.name}: object", f"one of {sorted(tables)}", object_of(tensor.name))
        tables[object_of(tensor.name)].append(tensor)
    for name, found in part.objects.items():
        if not _NAME.match(name):
            expect("name of an object", "letters, digits, '_', '.', '-'", repr(name))
        try:
            expected = object_digest(part.state[name], tables[name])
        except RecursionError:
            raise CorruptCheckpoint(f"{node.file}: state.{name}: nested too deeply") from None
        expect(f"digest of {name}", expected, found)


def _base_of(chunks: Sequence[Chunk], chunk: Chunk) -> str:
    """Older packs have higher indices, so no chain of bases is endless."""
    assert chunk.pack is not None
    assert chunk.base is not None
    if chunk.base >= len(chunks):
        return f"chunk {chunk.base} of {len(chunks)}"
    base = chunks[chunk.base]
    if base.pack is None or base.pack <= chunk.pack:
        return f"one in pack {base.pack}"
    return "one in an older pack" if base.raw == chunk.raw else f"one of {base.raw} bytes"


def _cast_of(chunks: Sequence[Chunk], chunk: Chunk) -> tuple[str, str]:
    """What it is to be the cast of, and what it is: never of a cast, so there is no chain."""
    expected = f"of {CAST_FACTOR * chunk.raw} stored bytes"
    if max(chunk.cast_of) >= len(chunks):
        return expected, f"of chunk {max(chunk.cast_of)} of {len(chunks)}"
    if chunk.raw % 2:
        return "of whole numbers", f"of {chunk.raw} bytes"
    sources = [chunks[index] for index in chunk.cast_of]
    if any(source.cast_of for source in sources):
        return expected, "of a cast"
    return expected, f"of {sum(source.raw for source in sources)} stored bytes"
