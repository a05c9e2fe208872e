"""How one chunk is encoded. Pure. Today everything is stored raw.

A codec is a pair of functions under a name that is recorded per chunk, so a checkpoint can mix
them and old ones stay readable when codecs are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoglm_resume.checkpoint.document import Buffer
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat

RAW = "raw"


@dataclass(frozen=True)
class Codec:
    encode: Callable[[Buffer], Buffer]
    decode: Callable[[Buffer, int], Buffer]
    """Takes the stored bytes and the raw size; raises CorruptCheckpoint if they disagree."""


def _decode_raw(stored: Buffer, raw_size: int) -> Buffer:
    if len(stored) != raw_size:
        raise CorruptCheckpoint(f"raw chunk: expected {raw_size} bytes, found {len(stored)}")
    return stored


CODECS: Mapping[str, Codec] = {RAW: Codec(encode=lambda chunk: chunk, decode=_decode_raw)}


def encode(chunk: Buffer) -> tuple[str, Buffer]:
    """The codec chosen for this chunk, and the bytes to store."""
    return RAW, CODECS[RAW].encode(chunk)


def decode(codec: str, stored: Buffer, raw_size: int) -> Buffer:
    """The `raw_size` bytes that were encoded. Raises NewerFormat, CorruptCheckpoint."""
    if codec not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise NewerFormat(
            f"a chunk is encoded with {codec!r}, this version knows: {known}",
            hint="upgrade autoglm-resume to the version that wrote the checkpoint",
        )
    return CODECS[codec].decode(stored, raw_size)
