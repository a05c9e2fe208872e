"""How one chunk of a tensor is encoded: lossless, chosen chunk by chunk. Pure.

    raw      the bytes as they are
    zstd     one frame: items of one byte, lengths that are no multiple of the item
    planesN  items of N bytes as N planes: all their lowest bytes, all their second bytes, ...
    floatsN  planes of the items rotated left by one bit: the top plane has no sign, only exponent
    deltaN   planes of the difference to the base chunk

Stored planes begin with their N lengths (4 bytes each, little-endian); a plane that zstd does not
shrink is stored raw, which its length tells. Trained weights and optimizer state have no repeats
worth a search, only skewed bytes in the upper planes, so zstd is set to little more than its
Huffman coder: on such data that is both smaller and twice as fast as level 1.

The difference is that of the bit patterns as integers, which for two floats of one sign is their
distance in units of the last place. It is centred on the middle of every byte, so that small ones
of either sign leave the upper planes constant.

NumPy and zstandard are imported when they are needed: raw chunks are read without them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from autoglm_resume.checkpoint.format.document import Buffer
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import zstandard

    Bytes: TypeAlias = npt.NDArray[np.uint8]
    Numbers: TypeAlias = npt.NDArray[Any]

Effort: TypeAlias = Literal["off", "fast", "small"]
"""Raw; planes; planes, or the difference to a base where a sample says that it is smaller."""

RAW = "raw"
ZSTD = "zstd"
PLANES: Mapping[int, str] = {2: "planes2", 4: "planes4", 8: "planes8"}
FLOATS: Mapping[int, str] = {2: "floats2", 4: "floats4", 8: "floats8"}
DELTA: Mapping[int, str] = {2: "delta2", 4: "delta4", 8: "delta8"}

_SIZES = {name: size for kind in (PLANES, FLOATS, DELTA) for size, name in kind.items()}

_WITHOUT_BASE: Mapping[str, str] = {
    **dict.fromkeys(("uint16", "int16"), PLANES[2]),
    **dict.fromkeys(("uint32", "int32"), PLANES[4]),
    **dict.fromkeys(("uint64", "int64"), PLANES[8]),
    **dict.fromkeys(("bfloat16", "float16", "complex32"), FLOATS[2]),
    **dict.fromkeys(("float32", "complex64"), FLOATS[4]),
    **dict.fromkeys(("float64", "complex128"), FLOATS[8]),
}
"""Of every other dtype: zstd."""

_LENGTH_BYTES = 4
_WINDOW_LOG = 20
_MIN_SAVING = 1 / 64
"""Of a plane, or of a chunk; below that it is stored raw, which is faster to read."""
_MIN_SAVING_BY_BASE = 1 / 32
_RUNS, _RUN_BYTES = 8, 4096
"""The sample: runs at equal distances. Multiples of every item size."""


@dataclass(frozen=True)
class Encoded:
    """`data` is what to store; for raw it is the chunk that was given, not a copy."""

    codec: str
    data: Buffer
    based: bool
    """Whether decoding takes the base chunk."""


def encode(
    chunk: memoryview, dtype: str, effort: Effort, base: memoryview | None = None
) -> Encoded:
    """Encode a chunk of a tensor of this dtype (named as torch does); it never grows.

    `base` is the same chunk of an earlier snapshot, of the same length.
    """
    if effort == "off" or not chunk.nbytes:
        return Encoded(RAW, chunk, based=False)
    import numpy as np

    items = np.frombuffer(chunk, np.uint8)
    codec = _WITHOUT_BASE.get(dtype, ZSTD)
    if items.size % _SIZES.get(codec, 1):
        codec = ZSTD
    if codec == ZSTD:
        data = _compress(items)
    else:
        based = None if base is None or effort != "small" else np.frombuffer(base, np.uint8)
        if based is not None and _pays(codec, items, based):
            codec = DELTA[_SIZES[codec]]
        data = _pack(codec, items, based)
    if not _saves(len(data), items.size):
        return Encoded(RAW, chunk, based=False)
    return Encoded(codec, data, based=codec in DELTA.values())


def decode(codec: str, stored: Buffer, target: memoryview, base: Buffer | None = None) -> None:
    """Fill `target`, which has the chunk's raw size, from what encode() stored.

    Takes memory in proportion to `target`, whatever `stored` says. Raises CorruptCheckpoint (then
    `target` holds anything), and NewerFormat when the codec is not known. Bytes that are wrong
    but well-formed decode to a wrong chunk: only a digest can tell.
    """
    if codec == RAW:
        _expect("raw chunk", target.nbytes, memoryview(stored).nbytes)
        target[:] = stored
        return
    if codec != ZSTD and codec not in _SIZES:
        known = ", ".join(sorted((RAW, ZSTD, *_SIZES)))
        raise NewerFormat(
            f"a chunk is encoded with {codec!r}, this version knows: {known}",
            hint="upgrade autoglm-resume to the version that wrote the checkpoint",
        )
    import numpy as np

    found, items = np.frombuffer(stored, np.uint8), np.frombuffer(target, np.uint8)
    if codec == ZSTD:
        items[:] = _decompress(codec, found, items.size)
        return
    based = None
    if codec in DELTA.values():
        if base is None:
            _corrupt(codec, "a base chunk", "none")
        based = np.frombuffer(base, np.uint8)
        _expect(f"base of a {codec} chunk", items.size, based.size)
    _unpack(codec, found, items, based)


def planes(codec: str, items: Bytes, base: Bytes | None = None) -> Bytes:
    """What a codec hands to the entropy coder, one row per plane; one row for raw and zstd.

    The rows are memory of this thread that the next call writes over.
    """
    import numpy as np

    size = _SIZES.get(codec, 1)
    rows, *spare = _own().memory(items.size)
    numbers, changed, other = (memory.view(f"<u{size}") for memory in (items, *spare))
    if codec in FLOATS.values():
        np.left_shift(numbers, 1, out=changed)
        changed |= np.right_shift(numbers, 8 * size - 1, out=other)
        numbers = changed
    elif codec in DELTA.values():
        assert base is not None
        np.subtract(numbers, base.view(numbers.dtype), out=changed)
        changed += _centre(size)
        numbers = changed
    rows = rows.reshape(size, -1)
    rows[:] = numbers.view(np.uint8).reshape(-1, size).T
    return rows


def _pack(codec: str, items: Bytes, base: Bytes | None) -> bytes:
    """The lengths and the planes, of which not all need to be compressed."""
    packed = [_compress(row) for row in planes(codec, items, base)]
    lengths = [len(row).to_bytes(_LENGTH_BYTES, "little") for row in packed]
    return b"".join([*lengths, *packed])


def _unpack(codec: str, stored: Bytes, items: Bytes, base: Bytes | None) -> None:
    """Fill `items` from what _pack() made. Raises CorruptCheckpoint."""
    import numpy as np

    size = _SIZES[codec]
    for index, row in enumerate(_rows(codec, stored, items.size)):
        items[index::size] = row
    numbers = items.view(f"<u{size}")
    if codec in FLOATS.values():
        signs = _own().memory(items.size)[0].view(numbers.dtype)
        np.left_shift(numbers, 8 * size - 1, out=signs)
        numbers >>= 1
        numbers |= signs
    elif codec in DELTA.values():
        assert base is not None
        numbers += base.view(numbers.dtype)
        numbers -= _centre(size)


def _rows(codec: str, stored: Bytes, raw: int) -> Iterator[Bytes]:
    """The planes, of equal length. Raises CorruptCheckpoint."""
    size = _SIZES[codec]
    if raw % size:
        _corrupt(codec, f"a multiple of {size} bytes", f"{raw}")
    begin = size * _LENGTH_BYTES
    if stored.size < begin:
        _corrupt(codec, f"at least {begin} bytes", f"{stored.size}")
    lengths = stored[:begin].view("<u4").tolist()
    _expect(f"{codec} chunk", begin + sum(lengths), stored.size)
    for length in lengths:
        row = stored[begin : begin + length]
        yield row if length == raw // size else _decompress(codec, row, raw // size)
        begin += length


def _pays(codec: str, items: Bytes, base: Bytes) -> bool:
    """Whether the difference to `base` is worth reading a base when decoding; from a sample.

    It is for weights and second moments, until they have moved too far, and never for first
    moments, which forget in a few steps what they were.
    """

    apart = items.size // _RUNS // _RUN_BYTES * _RUN_BYTES
    if apart > _RUN_BYTES:
        items, base = (
            whole[: _RUNS * apart].reshape(_RUNS, apart)[:, :_RUN_BYTES].reshape(-1)
            for whole in (items, base)
        )
    alone, based = _pack(codec, items, None), _pack(DELTA[_SIZES[codec]], items, base)
    return len(based) < len(alone) - items.size * _MIN_SAVING_BY_BASE


def _centre(size: int) -> int:
    return int.from_bytes(b"\x80" * size, "little")


def _saves(stored: int, raw: int) -> bool:
    return stored < raw * (1 - _MIN_SAVING)


def _compress(data: Bytes) -> Buffer:
    """One frame, or the data themselves where that is not worth it."""
    frame = _own().compressor.compress(data.data)
    return frame if _saves(len(frame), data.size) else data.data


def _decompress(codec: str, frame: Bytes, size: int) -> Bytes:
    """The `size` bytes of a frame. Raises CorruptCheckpoint."""
    import numpy as np
    import zstandard

    try:
        # Before decompress(), which would allocate whatever size the frame claims.
        claimed = zstandard.get_frame_parameters(frame.data).content_size
        _expect(f"frame of a {codec} chunk", size, claimed)
        data = _own().decompressor.decompress(frame.data, size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        _corrupt(codec, "a frame of zstd", str(error), error)
    _expect(f"frame of a {codec} chunk", size, len(data))
    return np.frombuffer(data, np.uint8)


class _Own(threading.local):
    """Each thread has its own: they are not made to be shared, and take long to make."""

    def __init__(self) -> None:
        import zstandard

        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            min_match=7,
            hash_log=6,
            window_log=_WINDOW_LOG,
        )
        self.compressor: zstandard.ZstdCompressor = zstandard.ZstdCompressor(
            compression_params=parameters
        )
        self.decompressor: zstandard.ZstdDecompressor = zstandard.ZstdDecompressor(
            max_window_size=1 << _WINDOW_LOG
        )
        self._memory: list[Bytes] = []

    def memory(self, size: int) -> list[Bytes]:
        """Three times `size` bytes, the same every time: fresh memory takes longer to touch than
        to fill."""
        if not self._memory or self._memory[0].size < size:
            import numpy as np

            self._memory = [np.empty(size, np.uint8) for _ in range(3)]
        return [memory[:size] for memory in self._memory]


@cache
def _own() -> _Own:
    return _Own()


def _expect(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise CorruptCheckpoint(f"{what}: expected {expected} bytes, found {found}")


def _corrupt(codec: str, expected: str, found: str, cause: Exception | None = None) -> NoReturn:
    raise CorruptCheckpoint(f"{codec} chunk: expected {expected}, found {found}") from cause
