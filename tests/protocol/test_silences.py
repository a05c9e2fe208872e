from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.protocol import silences
from autoglm_resume.protocol.heartbeats import Board, Phase

COUNTS = st.dictionaries(st.integers(0, 15), st.dictionaries(st.integers(0, 127), st.integers(1)))


@given(st.integers(0, 2**62))
def test_a_bucket_holds_silences_up_to_its_longest_and_is_half_an_octave_wide(silence: int) -> None:
    at = silences.bucket(silence)
    assert 0 <= at < silences.BUCKETS
    assert silence / 1e9 <= silences.longest(at) * (1 + 1e-12)
    assert silences.longest(at) <= max(silence, 1) * 1.5 / 1e9


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_a_longer_silence_is_in_no_lower_bucket(one: int, other: int) -> None:
    assert (one <= other) <= (silences.bucket(one) <= silences.bucket(other))


def test_silences_are_counted_under_the_phase_in_which_they_began_and_starts_as_one() -> None:
    board, _ = Board.create(2)
    pulse = board.pulse(1)
    pulse.phase(Phase.START)
    pulse.phase(Phase.FORWARD)  # the first step, compilation and all
    pulse.completed(1)
    pulse.phase(Phase.FORWARD)
    pulse.phase(Phase.BACKWARD)
    pulse.completed(2)
    counts = {Phase(at): sum(c.values()) for at, c in board.silences[1].all().items()}
    assert counts == {Phase.START: 2, Phase.DATA: 1, Phase.FORWARD: 1, Phase.BACKWARD: 1}
    assert board.silences[1].seconds(Phase.START) > 0
    assert board.silences[0].all() == {}
    board.close()


@given(COUNTS, COUNTS)
def test_merging_adds_and_leaves_its_arguments_alone(
    one: dict[int, dict[int, int]], other: dict[int, dict[int, int]]
) -> None:
    before = {phase: dict(counts) for phase, counts in one.items()}
    total = silences.merged([one, other])
    assert one == before
    for phase in range(16):
        for at in range(128):
            expected = one.get(phase, {}).get(at, 0) + other.get(phase, {}).get(at, 0)
            assert total.get(phase, {}).get(at, 0) == expected
