from __future__ import annotations

import pytest

from autoglm_resume.checkpoint import codec
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat


def test_a_chunk_comes_back() -> None:
    name, stored = codec.encode(b"abc")
    assert bytes(codec.decode(name, stored, 3)) == b"abc"


def test_a_codec_from_the_future_is_named() -> None:
    with pytest.raises(NewerFormat, match="lz99"):
        codec.decode("lz99", b"", 0)


def test_a_chunk_of_the_wrong_size_is_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match="expected 4 bytes, found 3"):
        codec.decode("raw", b"abc", 4)
