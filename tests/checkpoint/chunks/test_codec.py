from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.chunks import codec
from autoglm_resume.checkpoint.chunks.codec import Effort, Encoded
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, DTYPE_BYTES
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat

DTYPES = sorted(DTYPE_BYTES)
EFFORTS: list[Effort] = ["off", "fast", "small"]
Array: TypeAlias = npt.NDArray[Any]
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}


def decoded(encoded: Encoded, size: int, base: bytes | None = None) -> bytes:
    target = bytearray(size)
    codec.decode(encoded.codec, encoded.data, memoryview(target), base)
    return bytes(target)


def weights(count: int = 100_000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32)


def trained(before: Array, scale: float = 1e-4, seed: int = 1) -> Array:
    moved: Array = scale * np.random.default_rng(seed).normal(0, 1, before.size)
    return before + moved.astype(np.float32)


def view(array: Array) -> memoryview:
    return array.data.cast("B")


@st.composite
def contents(draw: st.DrawFn, size: int) -> bytes:
    """Random bytes, all alike, few values, or near to each other as numbers."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["random", "constant", "few", "normal"]))
    if kind == "constant":
        return bytes([seed % 256]) * size
    if kind == "normal":
        return random.normal(0, 0.02, size // 4 + 1).astype(np.float32).tobytes()[:size]
    return random.integers(0, 256 if kind == "random" else 3, size, np.uint8).tobytes()


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(EFFORTS), st.booleans())
def test_every_chunk_comes_back_bit_by_bit_and_never_grows(
    data: st.DataObject, dtype: str, effort: Effort, based: bool
) -> None:
    size = data.draw(st.integers(0, 300) | st.integers(60_000, 140_000))
    chunk = data.draw(contents(size))
    base = data.draw(contents(size)) if based else None
    encoded = codec.encode(memoryview(chunk), dtype, effort, memoryview(base) if base else None)
    assert decoded(encoded, size, base if encoded.based else None) == chunk
    assert len(encoded.data) <= size


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_kind_of_float_comes_back(dtype: str, effort: Effort) -> None:
    """All patterns of 16 bits; of more, all tops over several bottoms: NaNs, infinities, -0 ..."""
    bits = BITS[dtype]
    tops = np.arange(2**16, dtype=np.uint64) << (bits - 16)
    patterns = np.concatenate([tops | low for low in {0, 1, 2 ** (bits - 16) - 1}])
    chunk = patterns.astype(f"<u{bits // 8}")
    base = np.roll(chunk, 1)
    for other in (base, chunk, np.zeros_like(chunk)):
        encoded = codec.encode(view(chunk), dtype, effort, view(other))
        assert decoded(encoded, chunk.nbytes, other.tobytes()) == chunk.tobytes()


def test_weights_are_stored_as_planes_and_moved_ones_as_a_difference() -> None:
    before = weights()
    after = trained(before)
    alone = codec.encode(view(after), "float32", "small")
    fast = codec.encode(view(after), "float32", "fast", view(before))
    small = codec.encode(view(after), "float32", "small", view(before))
    assert (alone.codec, fast.codec, small.codec) == ("floats4", "floats4", "delta4")
    assert (alone.based, fast.based, small.based) == (False, False, True)
    assert len(small.data) < 0.75 * after.nbytes < len(alone.data) < 0.9 * after.nbytes


def test_a_difference_that_a_sample_finds_no_smaller_is_not_taken() -> None:
    encoded = codec.encode(view(weights(seed=1)), "float32", "small", view(weights(seed=2)))
    assert encoded.codec == "floats4"


@pytest.mark.parametrize(
    ("dtype", "name"), [("uint8", "zstd"), ("int16", "planes2"), ("int64", "planes8")]
)
def test_counted_things_shrink(dtype: str, name: str) -> None:
    chunk = np.arange(20_000).astype(dtype)
    encoded = codec.encode(view(chunk), dtype, "fast")
    assert encoded.codec == name
    assert len(encoded.data) < 0.7 * chunk.nbytes


def test_a_chunk_that_ends_within_an_item_is_taken_as_bytes() -> None:
    chunk = bytes(999)
    encoded = codec.encode(memoryview(chunk), "float32", "small", memoryview(chunk))
    assert encoded.codec == "zstd"
    assert decoded(encoded, 999) == chunk


@pytest.mark.parametrize("effort", EFFORTS)
def test_what_does_not_shrink_is_the_chunk_itself_not_a_copy(effort: Effort) -> None:
    chunk = memoryview(np.random.default_rng(0).bytes(CHUNK_BYTES))
    encoded = codec.encode(chunk, "int32", effort)
    assert encoded.codec == codec.RAW
    assert encoded.data is chunk


def test_memory_at_any_address_is_read_and_written() -> None:
    before, after = weights(), trained(weights())
    room = bytearray(3 * after.nbytes + 3)
    shifted = [memoryview(room)[n * after.nbytes + n + 1 :][: after.nbytes] for n in range(3)]
    shifted[0][:], shifted[1][:] = view(before), view(after)
    encoded = codec.encode(shifted[1], "float32", "small", shifted[0])
    assert encoded.based
    codec.decode(encoded.codec, encoded.data, shifted[2], shifted[0])
    assert shifted[2] == shifted[1]


def test_threads_do_not_disturb_each_other() -> None:
    chunks = [weights(50_000, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda chunk: codec.encode(view(chunk), "float32", "fast"), chunks))
        back = list(pool.map(lambda encoded: decoded(encoded, 200_000), every))
    assert back == [chunk.tobytes() for chunk in chunks]


def test_raw_chunks_need_neither_numpy_nor_zstandard() -> None:
    program = """
import sys
from autoglm_resume.checkpoint.chunks import codec
stored = codec.encode(memoryview(b"abc"), "float32", "off").data
codec.decode("raw", stored, memoryview(bytearray(3)))
sys.exit("numpy" in sys.modules or "zstandard" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# What can be wrong with stored bytes


def test_a_codec_from_the_future_is_named() -> None:
    with pytest.raises(NewerFormat, match="'lz99', this version knows: delta2"):
        codec.decode("lz99", b"", memoryview(bytearray(4)))


def test_a_raw_chunk_of_the_wrong_size_is_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match="expected 4 bytes, found 3"):
        codec.decode("raw", b"abc", memoryview(bytearray(4)))


def stored_chunks() -> dict[str, tuple[Encoded, bytes, bytes]]:
    """One of every codec, with its raw bytes and base."""
    found = {}
    for dtype, item in (("uint8", 1), ("uint16", 2), ("uint32", 4), ("uint64", 8)):
        chunk = np.random.default_rng(item).integers(0, 100, 3000).astype(dtype)
        base = chunk + np.random.default_rng(0).integers(0, 2, 3000).astype(dtype)
        for effort in EFFORTS:
            of_floats = {2: "bfloat16", 4: "float32", 8: "float64"}.get(item, dtype)
            for name in (dtype, of_floats):
                encoded = codec.encode(view(chunk), name, effort, view(base))
                found[encoded.codec] = encoded, chunk.tobytes(), base.tobytes()
    return found


STORED = stored_chunks()


def test_the_chunks_to_damage_are_of_every_codec() -> None:
    every = {codec.RAW, codec.ZSTD, *codec.PLANES.values(), *codec.FLOATS.values()}
    assert set(STORED) == every | set(codec.DELTA.values())


@given(st.data(), st.sampled_from(sorted(STORED)))
def test_damaged_bytes_are_corrupt_or_decode_to_something(data: st.DataObject, name: str) -> None:
    encoded, chunk, base = STORED[name]
    stored = bytearray(encoded.data)
    where = data.draw(st.integers(0, len(stored) - 1) | st.integers(0, 40))
    match data.draw(st.sampled_from(["flip", "cut", "zero", "insert", "append", "other size"])):
        case "flip":
            stored[where] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del stored[where:]
        case "zero":
            stored[where : where + 64] = bytes(len(stored[where : where + 64]))
        case "insert":
            stored[where:where] = data.draw(st.binary(min_size=1, max_size=8))
        case "append":
            stored += data.draw(st.binary(min_size=1, max_size=8))
        case _:
            chunk, base = (whole[: data.draw(st.integers(0, 200))] for whole in (chunk, base))
    with contextlib.suppress(CorruptCheckpoint):
        codec.decode(name, stored, memoryview(bytearray(len(chunk))), base)


@given(st.sampled_from(sorted(STORED)), st.binary(max_size=100), st.integers(0, 40))
def test_noise_is_corrupt_or_decodes_to_something(name: str, stored: bytes, size: int) -> None:
    with contextlib.suppress(CorruptCheckpoint):
        codec.decode(name, stored, memoryview(bytearray(size)), bytes(size))


@pytest.mark.parametrize("name", sorted(STORED))
def test_every_truncation_is_corrupt(name: str) -> None:
    encoded, chunk, base = STORED[name]
    for length in range(0, len(encoded.data), 97):
        with pytest.raises(CorruptCheckpoint):
            decoded(Encoded(name, encoded.data[:length], encoded.based), len(chunk), base)


@pytest.mark.parametrize("base", [None, b"", bytes(11)])
def test_a_difference_without_its_base_is_corrupt(base: bytes | None) -> None:
    encoded, chunk, _ = STORED["delta4"]
    with pytest.raises(CorruptCheckpoint, match="base"):
        decoded(encoded, len(chunk), base)


def bombs() -> dict[str, bytes]:
    """Frames that are or claim to be far larger than the 1000 bytes they are decoded to."""
    huge = bytes(1 << 26)
    honest = zstandard.ZstdCompressor().compress(huge)
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    single_segment_8_byte_size = 0xE0
    lie = struct.pack("<IBQ", 0xFD2FB528, single_segment_8_byte_size, 1 << 50)
    return {
        "honest": honest,
        "of unknown size": stream.compress(huge) + stream.flush(),
        "claiming a petabyte": lie + b"\x01\x00\x00",
        "claiming the right size": struct.pack("<IBBH", 0xFD2FB528, 0x40, 0x88, 1000 - 256)
        + honest[-20:],
        "two": zstandard.ZstdCompressor().compress(bytes(1000)) + honest,
    }


@pytest.mark.parametrize("bomb", bombs())
def test_a_bomb_is_refused_before_it_takes_memory(bomb: str) -> None:
    frame = bombs()[bomb]
    planes = struct.pack("<4I", 1000, 1000, 1000, len(frame)) + bytes(3000) + frame
    for name, stored, size in (("zstd", frame, 1000), ("planes4", planes, 4000)):
        target = memoryview(bytearray(size))
        tracemalloc.start()
        try:
            with pytest.raises(CorruptCheckpoint):
                codec.decode(name, stored, target)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
