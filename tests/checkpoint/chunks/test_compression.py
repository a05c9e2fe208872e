"""How hard to compress."""

from __future__ import annotations

import pytest

from autoglm_resume.checkpoint.chunks.compression import SAMPLE, Pace
from autoglm_resume.checkpoint.format.options import Compress

MB = 1e6


def paced(encoding: float = 0, decoding: float = 0, writing: float = 0, reading: float = 0) -> Pace:
    """What was seen, in MB/s; nothing where that is 0."""
    pace = Pace()
    for rate, speed in (
        (pace.encoding, encoding),
        (pace.decoding, decoding),
        (pace.writing, writing),
        (pace.reading, reading),
    ):
        if speed:
            rate.saw(100_000_000, 100 / speed)
    return pace


@pytest.mark.parametrize("asked", ["off", "fast", "small"])
def test_what_is_asked_for_is_done(asked: Compress) -> None:
    for pace in (Pace(), paced(1600, 2700, 2000, 2000), paced(1600, 2700, 10, 10)):
        assert pace.effort(asked, 0) == pace.effort(asked, 10**6) == asked


# Two cores encode 1600 MB/s and decode 2700 MB/s: both, one after the other, 1005 MB/s.
@pytest.mark.parametrize(
    ("writing", "reading", "effort"),
    [
        (3000, 5000, "off"),  # a good local disk
        (2000, 2000, "off"),
        (600, 800, "off"),
        (490, 800, "fast"),
        (450, 550, "fast"),  # SATA
        (110, 110, "fast"),  # a network of 1 Gbit/s
        (110, 1300, "fast"),
        (110, 1400, "off"),  # saved faster, but decoding would hold up a load
        (10, 20, "fast"),  # and never differences
    ],
)
def test_auto_compresses_where_neither_saving_nor_loading_becomes_slower(
    writing: float, reading: float, effort: str
) -> None:
    assert paced(1600, 2700, writing, reading).effort("auto", 0) == effort


def test_auto_goes_by_the_processors_too() -> None:
    for speed, effort in ((1.0, "fast"), (0.25, "off")):
        assert paced(1600 * speed, 2700 * speed, 300, 300).effort("auto", 9) == effort


def test_the_first_pack_begins_with_a_sample() -> None:
    for pace in (Pace(), paced(encoding=1600), paced(writing=100, reading=100)):
        efforts = [pace.effort("auto", nth) for nth in range(SAMPLE + 2)]
        assert efforts == ["fast"] * SAMPLE + ["off"] * 2
    known = paced(encoding=1600, decoding=2700)
    assert known.effort("auto", 0) == "off", "the storage is not known yet"


def test_the_latest_counts_most_and_nothing_says_nothing() -> None:
    pace = paced(1600, 2700, 3000, 3000)
    before = pace.writing.time
    pace.writing.saw(0, 10.0)
    pace.writing.saw(10, 0.0)
    assert pace.writing.time == before
    for _ in range(20):
        pace.writing.saw(100_000_000, 1.0)
        pace.reading.saw(100_000_000, 1.0)
    assert pace.writing.time == pytest.approx(1 / (100 * MB), rel=0.05)
    assert pace.effort("auto", 0) == "fast"
