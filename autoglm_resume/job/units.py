"""Durations and sizes as people write them: `1h30m` is 5400.0 seconds, `4GiB` is 4294967296 bytes.

Each `parse` raises ValueError on what it cannot read; each `format` gives text that parses back to
the same value.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

DURATION_PATTERN: Final = (
    r"^(?=\d)(\d+(\.\d+)?d)?(\d+(\.\d+)?h)?(\d+(\.\d+)?m(?!s))?(\d+(\.\d+)?s)?(\d+(\.\d+)?ms)?$"
    r"|^\d+(\.\d+)?$"
)
SIZE_PATTERN: Final = r"^\d+(\.\d+)?([kKMGTP]B|[KMGTP]iB|B)?$"

_SECONDS: Final = {
    "d": Decimal(86400),
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_BINARY: Final = {f"{prefix}iB": 1024 ** (n + 1) for n, prefix in enumerate("KMGTP")}
_DECIMAL: Final = {f"{prefix}B": 1000 ** (n + 1) for n, prefix in enumerate("KMGTP")}
_BYTES: Final = {**_BINARY, **_DECIMAL, "kB": 1000, "B": 1, "": 1}

# Timers of the operating system overflow long before a float does.
LONGEST_DURATION: Final = 1000 * 86400.0
LARGEST_SIZE: Final = 2**63 - 1


def parse_duration(value: object) -> float:
    """Seconds in `500ms`, `90s`, `1h30m`, or in a bare number of seconds; from 0 to 1000 days."""
    if isinstance(value, str) and re.fullmatch(DURATION_PATTERN, value, re.ASCII):
        pairs = re.findall(r"([\d.]+)(ms|[dhms]?)", value)
        seconds = float(sum(Decimal(number) * _SECONDS[unit or "s"] for number, unit in pairs))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(min(value, 2 * LONGEST_DURATION))  # an int can be too large for a float
    else:
        raise ValueError(f"not a duration: {value!r}")
    if not 0 <= seconds <= LONGEST_DURATION:
        raise ValueError(f"not from 0 to 1000 days: {value!r}")
    return seconds


def format_duration(seconds: float) -> str | float:
    """`1h30m` for 5400.0; the number itself where whole milliseconds would not be exact."""
    milliseconds = round(seconds * 1000)
    text, rest = "", milliseconds
    for unit, size in (
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return (text or "0s") if milliseconds / 1000 == seconds else seconds


def parse_size(value: object) -> int:
    """Bytes in `4GiB` (1024-based), `500MB` (1000-based), or in a bare number of bytes."""
    if isinstance(value, str) and re.fullmatch(SIZE_PATTERN, value, re.ASCII):
        number, unit = re.fullmatch(r"([\d.]+)(\w*)", value, re.ASCII).groups()  # type: ignore[union-attr]
        exact = Decimal(number) * _BYTES[unit]
        size = int(exact)
        if size != exact:
            raise ValueError(f"not a whole number of bytes: {value!r}")
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise ValueError(f"not a size: {value!r}")
    if not 0 <= size <= LARGEST_SIZE:
        raise ValueError(f"not from 0 to 8 EiB: {value!r}")
    return size


def format_size(size: int) -> str | int:
    """`4GiB` where a unit divides `size` exactly, else the number of bytes."""
    for units in (_BINARY, _DECIMAL):
        for unit, factor in reversed(units.items()):
            if size and size % factor == 0:
                return f"{size // factor}{unit}"
    return size
