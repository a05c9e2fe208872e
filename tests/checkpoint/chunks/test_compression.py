"""How hard to compress."""

from __future__ import annotations

import pytest

from autoglm_resume.checkpoint.chunks.compression import SAMPLE, Throughput
from autoglm_resume.checkpoint.format.options import Compress

MB = 1e6


def measured(
    encoding: float = 0, decoding: float = 0, writing: float = 0, reading: float = 0
) -> Throughput:
    """What was measured, in MB/s; nothing where that is 0."""
    throughput = Throughput()
    for rate, speed in (
        (throughput.encoding, encoding),
        (throughput.decoding, decoding),
        (throughput.writing, writing),
        (throughput.reading, reading),
    ):
        if speed:
            rate.add(100_000_000, 100 / speed)
    return throughput


@pytest.mark.parametrize("asked", ["off", "fast", "small"])
def test_what_is_asked_for_is_done(asked: Compress) -> None:
    for throughput in (
        Throughput(),
        measured(1600, 2700, 2000, 2000),
        measured(1600, 2700, 10, 10),
    ):
        assert throughput.effort(asked, 0) == throughput.effort(asked, 10**6) == asked


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
    assert measured(1600, 2700, writing, reading).effort("auto", 0) == effort


def test_auto_goes_by_the_processors_too() -> None:
    for speed, effort in ((1.0, "fast"), (0.25, "off")):
        assert measured(1600 * speed, 2700 * speed, 300, 300).effort("auto", 9) == effort


def test_the_first_pack_begins_with_a_sample() -> None:
    for throughput in (Throughput(), measured(encoding=1600), measured(writing=100, reading=100)):
        efforts = [throughput.effort("auto", nth) for nth in range(SAMPLE + 2)]
        assert efforts == ["fast"] * SAMPLE + ["off"] * 2
    known = measured(encoding=1600, decoding=2700)
    assert known.effort("auto", 0) == "off", "the storage is not known yet"


def test_the_latest_counts_most_and_nothing_says_nothing() -> None:
    throughput = measured(1600, 2700, 3000, 3000)
    before = throughput.writing.time
    throughput.writing.add(0, 10.0)
    throughput.writing.add(10, 0.0)
    assert throughput.writing.time == before
    for _ in range(20):
        throughput.writing.add(100_000_000, 1.0)
        throughput.reading.add(100_000_000, 1.0)
    assert throughput.writing.time == pytest.approx(1 / (100 * MB), rel=0.05)
    assert throughput.effort("auto", 0) == "fast"
