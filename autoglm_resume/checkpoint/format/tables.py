"""The tables of a part: tensors, the chunks they are cut into, the packs that hold these. Pure.

A tensor is cut into chunks of CHUNK_BYTES from its own beginning, so equal tensors have equal
chunks wherever they are stored. All digests are of raw bytes, before encoding.

A chunk is stored once, if at all: in the part's own pack; in the pack that the same rank wrote for
an older checkpoint; or, where ranks hold the same bytes, with one of the other ranks, whose part
says where. A delta is decoded with its base, which is always in an older pack. A chunk that is the
cast of others is stored nowhere: the part says of which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autoglm_resume.checkpoint.format.document import Json, JsonNode, canonical, columns, digest
from autoglm_resume.checkpoint.format.ids import is_id

CHUNK_BYTES = 1 << 20
LARGEST_TENSOR = 1 << 58
"""Elements, of 16 bytes at most: its bytes are still a number of 63 bits."""
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


@dataclass(frozen=True)
class Chunk:
    """`raw` bytes with this digest, stored as `stored` bytes at `offset` of a pack.

    `pack`, `base` (of a delta) and `cast_of` are indices into the part's packs and chunks. With
    `cast_of`, the chunk is stored nowhere: it is the cast to the dtype `codec` of those chunks of
    float32, one after the other (see chunks/casts.py). With neither that nor a pack, another rank
    of the same checkpoint has it.
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


def object_digest(tree: Json, tensors: Iterable[Tensor]) -> str:
    """Of one object's state: the same for equal states, whatever rank, attempt or time."""
    table = sorted([t.name, t.dtype, list(t.shape), t.digest] for t in tensors)
    return digest(canonical({"state": tree, "tensors": table}))


def object_of(tensor_name: str) -> str:
    """Tensors are named `<object>/<path inside its state>`."""
    return tensor_name.partition("/")[0]


def read_chunk(node: JsonNode) -> Chunk:
    """Raises CorruptCheckpoint, as those below."""
    digest, raw, pack, stored, offset, codec, base, cast_of = columns(node, 8)
    sources = cast_of.whole_numbers()
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


def read_tensor(node: JsonNode) -> Tensor:
    if node["dtype"].text() not in DTYPE_BYTES:
        node["dtype"].fail("a known dtype")
    shape = node["shape"].whole_numbers()
    # Dimensions of 0 hide how large the others are, which torch multiplies all the same.
    if math.prod(size or 1 for size in shape) > LARGEST_TENSOR:
        node["shape"].fail(f"at most {LARGEST_TENSOR} elements")
    return Tensor(
        name=node["name"].text(),
        dtype=node["dtype"].text(),
        shape=shape,
        digest=node["digest"].digest(),
        chunks=node["chunks"].whole_numbers(),
    )


def read_pack(node: JsonNode) -> Pack:
    name = node["id"].text()
    if not is_id(name):
        node["id"].fail("a checkpoint id")
    return Pack(name, _fingerprint(node["fingerprint"]))


def _fingerprint(node: JsonNode) -> Fingerprint:
    return Fingerprint(
        size=node["size"].whole(),
        mtime_ns=node["mtime_ns"].whole(),
        ctime_ns=node["ctime_ns"].whole(),
        inode=node["inode"].whole(),
    )
