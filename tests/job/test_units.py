from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.job import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("90s", 90.0),
        ("10m", 600.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("1h30m", 5400.0),
        ("1m30s500ms", 90.5),
        ("1.5h", 5400.0),
        ("0.1s", 0.1),
        ("90", 90.0),
        (90, 90.0),
        (0.25, 0.25),
        (0, 0.0),
    ],
)
def test_a_duration_is_read_as_seconds(text: object, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *["", "s", "5x", "-5s", "5 m", "30m1h", "5m5m", "1e3", "٣s", "5s\n", "1001d"],
        *[-1, True, None, [], float("nan"), float("inf"), 10**400],
    ],
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="not"):
        units.parse_duration(text)


@given(st.floats(0, units.LONGEST_DURATION) | st.integers(0, 10**9).map(lambda ms: ms / 1000))
def test_a_formatted_duration_reads_back_exactly(seconds: float) -> None:
    assert units.parse_duration(units.format_duration(seconds)) == seconds


def test_a_duration_is_shown_in_the_units_people_use() -> None:
    shown = [units.format_duration(s) for s in (0, 0.5, 90, 5400, 86400, 1 / 3)]
    assert shown == ["0s", "500ms", "1m30s", "1h30m", "1d", 1 / 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5KiB", 1536),
        ("1kB", 1000),
        ("7B", 7),
        ("1024", 1024),
        (1024, 1024),
        (0, 0),
    ],
)
def test_a_size_is_read_as_bytes(text: object, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "4G", "GiB", "-1MB", "0.3B", "1 GB", "9999999PB", -1, 1.5, True, None]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="not"):
        units.parse_size(text)


@given(st.integers(0, units.LARGEST_SIZE) | st.integers(0, 900).map(lambda n: n << 30))
def test_a_formatted_size_reads_back_exactly(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size
