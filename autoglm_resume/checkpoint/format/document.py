"""JSON from untrusted bytes, one canonical spelling of it, and digests. Pure.

Whatever is wrong with a document (not UTF-8, not JSON, too deep, a missing key, a wrong type, an
absurd number) is a CorruptCheckpoint that names the file, what was expected and what was found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from blake3 import blake3

from autoglm_resume.errors import CorruptCheckpoint

Json: TypeAlias = Any
Buffer: TypeAlias = "bytes | bytearray | memoryview"

LARGEST_MANIFEST = 1 << 28
"""Bytes: a hundred times what ten thousand ranks need."""
LARGEST_PART = 1 << 32
"""Bytes: what a script keeps in lists is in there as text."""

PREFIX = "blake3:"
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_LARGEST = 2**63 - 1


def digest(data: Buffer) -> str:
    """BLAKE3 of `data`, as it is written in documents: `blake3:<64 hex digits>`."""
    return PREFIX + blake3(data).hexdigest()


def digest_of_digests(digests: Iterable[str]) -> str:
    """BLAKE3 over the concatenated raw bytes of `digests`, in their order."""
    whole = blake3()
    for each in digests:
        whole.update(bytes.fromhex(each[len(PREFIX) :]))
    return PREFIX + whole.hexdigest()


def canonical(value: Json) -> bytes:
    """The one spelling that digests are taken of: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def compact(value: Json) -> bytes:
    """No spaces, keys in their own order: for documents that machines read."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def indented(value: Json) -> bytes:
    """For documents that people open."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def parse(data: bytes, file: str) -> JsonNode:
    """The document in `data`. Raises CorruptCheckpoint naming `file`."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse,
            parse_float=_finite,
            object_pairs_hook=_different,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{file}: expected a JSON document, found {len(data)} bytes that are not one ({error})"
        ) from None
    return JsonNode(value, file)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _different(members: list[tuple[str, Json]]) -> dict[str, Json]:
    """Two readers of one document must not see two documents."""
    found = dict(members)
    if len(found) != len(members):
        raise ValueError("an object has two members of one name")
    return found


def _finite(literal: str) -> float:
    number = float(literal)
    return number if math.isfinite(number) else _refuse(literal)


@dataclass(frozen=True)
class JsonNode:
    """A value inside a document, and where it stands; every access checks the type.

    All methods raise CorruptCheckpoint when the value is not what they return.
    """

    value: Json
    file: str
    where: str = ""

    def fail(self, expected: str) -> NoReturn:
        found = "nothing" if self.value is None else _short(self.value)
        where = f"{self.file}: {self.where}" if self.where else self.file
        raise CorruptCheckpoint(f"{where}: expected {expected}, found {found}")

    def __getitem__(self, key: str) -> JsonNode:
        if not isinstance(self.value, dict):
            self.fail(f"an object with {key!r}")
        child = f"{self.where}.{key}" if self.where else key
        return JsonNode(self.value.get(key), self.file, child)

    def optional(self) -> JsonNode | None:
        return None if self.value is None else self

    def items(self) -> Iterator[JsonNode]:
        """One after the other: a node takes a hundred times what a number takes in a document."""
        if not isinstance(self.value, list):
            self.fail("a list")
        return (JsonNode(v, self.file, f"{self.where}[{i}]") for i, v in enumerate(self.value))

    def whole_numbers(self) -> tuple[int, ...]:
        """A list of them, in hardly more memory than it has already."""
        if not isinstance(self.value, list):
            self.fail("a list")
        for number in self.value:
            if type(number) is not int or not 0 <= number <= _LARGEST:
                JsonNode(number, self.file, f"{self.where}[…]").fail("a whole number from 0")
        return tuple(self.value)

    def members(self) -> dict[str, JsonNode]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        return {key: self[key] for key in self.value}

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.fail("a string")
        return self.value

    def matching(self, pattern: re.Pattern[str], expected: str) -> str:
        text = self.text()
        if not pattern.match(text):
            self.fail(expected)
        return text

    def digest(self) -> str:
        return self.matching(_DIGEST, "a blake3 digest")

    def file_name(self) -> str:
        return self.matching(_FILE_NAME, "a plain file name")

    def whole(self, minimum: int = 0) -> int:
        if type(self.value) is not int or not minimum <= self.value <= _LARGEST:
            self.fail(f"a whole number from {minimum}")
        return int(self.value)

    def seconds(self) -> float:
        number = self.value
        if type(number) is float and math.isfinite(number):
            return number
        return float(self.whole())

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def numbers(self) -> dict[str, float]:
        found = {}
        for key, node in self.members().items():
            if type(node.value) not in (int, float):
                node.fail("a number")
            try:
                found[key] = float(node.value)
            except OverflowError:  # JSON has no largest whole number
                node.fail("a number")
        return found

    def texts(self) -> dict[str, str]:
        return {key: node.text() for key, node in self.members().items()}

    def digests(self) -> dict[str, str]:
        return {key: node.digest() for key, node in self.members().items()}


def columns(row: JsonNode, count: int) -> list[JsonNode]:
    """The `count` values of a list."""
    if not isinstance(row.value, list) or len(row.value) != count:
        row.fail(f"{count} values")
    return list(row.items())


def _short(value: Json) -> str:
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if type(value) is int and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
