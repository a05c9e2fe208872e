"""A part: one rank's share of a checkpoint, as the JSON document beside its pack. Pure.

A tensor is cut into chunks of CHUNK_BYTES from its own beginning, so equal tensors have equal
chunks wherever they are stored. All digests are of raw bytes, before encoding.

A chunk is in one of three places: in the part's own pack; in the pack that the same rank wrote for
an older checkpoint; or, where ranks hold the same bytes, with one of the other ranks, whose part
says where. A delta is decoded with its base, which is always in an older pack. A chunk that is the
cast of others is in no place: the part says of which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from autoglm_resume.checkpoint.format.document import (
    Json,
    Node,
    canonical,
    columns,
    compact,
    digest,
    digest_of_digests,
    parse,
)
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, NewerFormat

FORMAT = 2
CHUNK_BYTES = 1 << 20
CAST_FACTOR = 2
"""Bytes that one byte of a cast is made of."""

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz"), 1),
    **dict.fromkeys(("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}

_ID = re.compile(r"step-(\d{10,18})\.([a-z0-9]{1,64})\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


def checkpoint_id(step: int, token: str) -> str:
    """`step` counts completed optimizer steps; `token` is `a<attempt>` or a random word."""
    name = f"step-{step:010d}.{token}"
    if not _ID.match(name):
        raise ValueError(f"no checkpoint id from step {step!r} and token {token!r}")
    return name


def parse_id(name: str) -> tuple[int, str] | None:
    """(step, token) of a checkpoint id, or None when `name` is not one."""
    match = _ID.match(name)
    return (int(match[1]), match[2]) if match else None


def age(name: str) -> tuple[int, int, str]:
    """Sort key of a checkpoint id: larger is newer. Raises ValueError when it is not one."""
    parsed = parse_id(name)
    if parsed is None:
        raise ValueError(f"{name!r} is not a checkpoint id")
    step, token = parsed
    attempt = int(token[1:]) if token[0] == "a" and token[1:].isdecimal() else -1
    return step, attempt, token


def part_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def pack_file(rank: int) -> str:
    return f"rank-{rank:05d}.pack"


@dataclass(frozen=True)
class Chunk:
    """`raw` bytes with this digest, stored as `stored` bytes at `offset` of a pack.

    `pack`, `base` (of a delta) and `cast_of` are indices into the part's packs and chunks. With
    `cast_of`, the chunk is stored nowhere: it is the cast to the dtype `codec` of those chunks of
    float32, one after the other (see derived.py). With neither that nor a pack, another rank of the
    same checkpoint has it.
    """

    digest: str
    raw: int
    pack: int | None
    stored: int = 0
    offset: int = 0
    codec: str = ""
    base: int | None = None
    cast_of: tuple[int, ...] = ()

    @property
    def with_peer(self) -> bool:
        """Whether another rank of the same checkpoint has it."""
        return self.pack is None and not self.cast_of


@dataclass(frozen=True)
class Tensor:
    """A tensor's type, shape, and its chunks as indices into the part's chunk table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Fingerprint:
    """What stat says of a file; unchanged means not written since it was verified."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Pack:
    """A file of chunks that this rank wrote for checkpoint `id`, as it was when verified."""

    id: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Part:
    """One rank's share. `state` maps each object of `objects` to its tree (see tree.py).

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
            tensors=tuple(map(_tensor, node["tensors"].items())),
            chunks=tuple(map(_chunk, node["chunks"].items())),
            packs=tuple(map(_pack, node["packs"].items())),
            metrics=node["metrics"].numbers(),
        )
        _check(part, node)
        return part


def object_digest(tree: Json, tensors: Iterable[Tensor]) -> str:
    """Of one object's state: the same for equal states, whatever rank, attempt or time."""
    table = sorted([t.name, t.dtype, list(t.shape), t.digest] for t in tensors)
    return digest(canonical({"state": tree, "tensors": table}))


def object_of(tensor_name: str) -> str:
    """Tensors are named `<object>/<path inside its state>`."""
    return tensor_name.partition("/")[0]


def check_format(node: Node) -> None:
    found = node["format"].whole(1)
    if found < FORMAT:
        # Format 1 was never released.
        raise CheckpointError(f"{node.file}: expected format {FORMAT}, found format {found}")
    if found > FORMAT:
        raise NewerFormat(
            f"{node.file}: format {found}, this version reads up to format {FORMAT}",
            hint="upgrade autoglm-resume to the version that wrote the checkpoint",
        )


def identity(node: Node) -> dict[str, Json]:
    """The fields that a part and its manifest share, checked."""
    name = node["id"].text()
    parsed = parse_id(name)
    if parsed is None:
        node["id"].fail("a checkpoint id")
    if node["step"].whole() != parsed[0]:
        node["step"].fail(f"step {parsed[0]} as in the id")
    return {
        "id": name,
        "step": parsed[0],
        "world_size": node["world_size"].whole(1),
        "created": node["created"].seconds(),
        "versions": node["versions"].texts(),
        "rng": node["rng"].flag(),
        "data": node["data"].flag(),
    }


def _chunk(node: Node) -> Chunk:
    digest, raw, pack, stored, offset, codec, base, cast_of = columns(node, 8)
    sources = tuple(index.whole() for index in cast_of.items())
    if sources:
        if pack.value is not None:
            pack.fail("no pack of a cast")
        return Chunk(digest.digest(), raw.whole(1), None, codec=codec.text(), cast_of=sources)
    if pack.value is None:
        return Chunk(digest.digest(), raw.whole(1), None)
    return Chunk(
        digest=digest.digest(),
        raw=raw.whole(1),
        pack=pack.whole(),
        stored=stored.whole(1),
        offset=offset.whole(),
        codec=codec.text(),
        base=None if base.value is None else base.whole(),
    )


def _pack(node: Node) -> Pack:
    name = node["id"].text()
    if parse_id(name) is None:
        node["id"].fail("a checkpoint id")
    return Pack(name, _fingerprint(node["fingerprint"]))


def _tensor(node: Node) -> Tensor:
    if node["dtype"].text() not in DTYPE_BYTES:
        node["dtype"].fail("a known dtype")
    return Tensor(
        name=node["name"].text(),
        dtype=node["dtype"].text(),
        shape=tuple(size.whole() for size in node["shape"].items()),
        digest=node["digest"].digest(),
        chunks=tuple(index.whole() for index in node["chunks"].items()),
    )


def _fingerprint(node: Node) -> Fingerprint:
    return Fingerprint(
        size=node["size"].whole(),
        mtime_ns=node["mtime_ns"].whole(),
        ctime_ns=node["ctime_ns"].whole(),
        inode=node["inode"].whole(),
    )


def _check(part: Part, node: Node) -> None:
    """Every reference from one table of the document to another."""

    def expect(what: str, expected: object, found: object) -> None:
        if expected != found:
            raise CorruptCheckpoint(f"{node.file}: {what}: expected {expected}, found {found}")

    if part.rank >= part.world_size:
        node["rank"].fail(f"a rank below {part.world_size}")
    for entry in part.lineage:
        if parse_id(entry) is None or entry == part.id:
            node["lineage"].fail("ids of other checkpoints")
    expect("its own pack", part.id, part.packs[0].id if part.packs else None)
    ages = [age(pack.id) for pack in part.packs]
    expect("packs, newest first", sorted(set(ages), reverse=True), ages)
    end = 0
    for index, chunk in enumerate(part.chunks):
        if chunk.raw > CHUNK_BYTES:
            expect(f"chunk {index}: raw size", f"at most {CHUNK_BYTES}", chunk.raw)
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
        chunks = [part.chunks[index] for index in tensor.chunks]
        expect(f"{tensor.name}: bytes", tensor.nbytes, sum(chunk.raw for chunk in chunks))
        expect(
            f"{tensor.name}: digest",
            digest_of_digests(chunk.digest for chunk in chunks),
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
