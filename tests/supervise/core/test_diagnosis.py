from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.failures import TRAITS, Kind
from autoglm_resume.protocol.heartbeats import Beat, Phase
from autoglm_resume.supervise.core.diagnosis import conclude
from autoglm_resume.supervise.core.evidence import (
    ErrorRecord,
    RankEvidence,
    Refusal,
    signal_name,
    where,
)

BEAT = Beat(pid=1, phase=Phase.BACKWARD, step=41, time=10**9, first_step_time=1)


def error(mono: float, type: str = "ValueError", message: str = "bad") -> ErrorRecord:
    return ErrorRecord(type, message, f"Traceback …\n{type}: {message}\n", mono)


def killed(rank: int, number: int = 9, **more: object) -> RankEvidence:
    return RankEvidence(rank, signal=number, beat=BEAT, **more)  # type: ignore[arg-type]


def raised(rank: int, mono: float, message: str = "bad", **more: object) -> RankEvidence:
    return RankEvidence(rank, code=1, beat=BEAT, error=error(mono, message=message), **more)  # type: ignore[arg-type]


def gone(rank: int, code: int | None, **more: object) -> RankEvidence:
    return RankEvidence(rank, code=code, beat=BEAT, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "kind", "root", "summary"),
    [
        ([killed(0)], Kind.KILLED, 0, "rank 0 died by SIGKILL at step 41, in backward"),
        ([killed(0, 11)], Kind.CRASHED, 0, "rank 0 died by SIGSEGV at step 41, in backward"),
        ([killed(0, 99)], Kind.KILLED, 0, "died by signal 99"),
        # A peer's exception follows from the signal, whichever was seen first.
        ([raised(0, 5.0), killed(1, order=1)], Kind.KILLED, 1, "SIGKILL"),
        ([killed(0, order=1), killed(1, 11, order=0)], Kind.CRASHED, 1, "SIGSEGV"),
        # Watchdogs abort victims: that may have come after somebody's exception or death.
        ([killed(0, order=1), killed(1, 6, order=0)], Kind.KILLED, 0, "SIGKILL"),
        ([raised(0, 5.0, order=1), killed(1, 6, order=0)], Kind.EXCEPTION, 0, "ValueError"),
        ([killed(0, 6)], Kind.CRASHED, 0, "SIGABRT"),
        # The earliest record is the root, not the earliest exit.
        ([raised(0, 5.2, order=0), raised(1, 5.1, order=1)], Kind.EXCEPTION, 1, "ValueError: bad"),
        # Code 1 without a record may be a victim's; another code is somebody's own doing.
        ([gone(0, 1), raised(1, 5.1, order=1)], Kind.EXCEPTION, 1, "ValueError"),
        ([raised(0, 5.0), gone(1, 3, order=1)], Kind.EXITED, 1, "rank 1 exited with code 3"),
        ([gone(0, 0), gone(1, 1)], Kind.EXITED, 1, "rank 1 exited with code 1 at step 41"),
        # Those that we ended ourselves are victims, however they ended.
        ([killed(0, order=0, by_us=True), raised(1, 9.0, order=1)], Kind.EXCEPTION, 1, "bad"),
        ([gone(0, 3, by_us=True), gone(1, 4, order=1)], Kind.EXITED, 1, "code 4"),
        # 75 is a rank that stopped as asked.
        ([gone(0, 75), gone(1, 2)], Kind.EXITED, 1, "code 2"),
        ([gone(0, 0), gone(1, 75)], Kind.UNKNOWN, None, "ended without a failed rank"),
        ([gone(0, None), gone(1, None)], Kind.UNKNOWN, None, "ended without a failed rank"),
        (
            [raised(0, 1.0, "The server socket has failed to listen … EADDRINUSE")],
            Kind.PORT,
            0,
            "EADDRINUSE",
        ),
        ([raised(0, 1.0, "Address already in use")], Kind.PORT, 0, "already in use"),
        ([raised(0, 1.0, "first line\nsecond line")], Kind.EXCEPTION, 0, "ValueError: first line "),
        ([raised(0, 1.0, "")], Kind.EXCEPTION, 0, "failed with ValueError at step"),
    ],
)
def test_the_root_rank_is_the_one_that_failed_by_itself(
    ranks: list[RankEvidence], kind: Kind, root: int | None, summary: str
) -> None:
    failure = conclude(ranks)
    assert (failure.kind, failure.rank) == (kind, root)
    assert summary in failure.summary
    assert failure.step == 41


def test_what_torchrun_says_is_kept_when_no_rank_failed() -> None:
    failure = conclude([gone(0, None)], agent="torchrun exited with code 2: no such option")
    assert failure.kind is Kind.LAUNCH
    assert failure.summary == "torchrun exited with code 2: no such option"


def test_of_hung_ranks_the_stopped_process_is_the_root() -> None:
    waiting = RankEvidence(0, beat=Beat(step=40, phase=Phase.BACKWARD, time=5 * 10**9))
    stopped = RankEvidence(
        1, beat=Beat(step=41, phase=Phase.FORWARD, time=6 * 10**9), state="stopped"
    )
    failure = conclude([waiting, stopped, killed(2)], hung=[0, 1])
    assert (failure.kind, failure.rank, failure.cause_mono) == (Kind.HANG, 1, 6.0)
    assert failure.summary == (
        "rank 1 stopped making progress at step 41, in forward (the process is stopped)"
    )


@pytest.mark.parametrize(
    ("first", "second", "root"),
    [
        (Beat(step=40, time=9), Beat(step=41, time=5), 0),
        (Beat(step=41, time=9), Beat(step=41, time=5), 1),
    ],
)
def test_without_a_stopped_one_the_rank_that_is_furthest_behind_is_the_root(
    first: Beat, second: Beat, root: int
) -> None:
    ranks = [RankEvidence(0, beat=first, state="sleeping"), RankEvidence(1, beat=second)]
    assert conclude(ranks, hung=[0, 1]).rank == root


def test_a_rank_that_is_not_hung_is_not_blamed_for_a_hang() -> None:
    behind = RankEvidence(0, beat=Beat(step=1))
    assert conclude([behind, RankEvidence(1, beat=Beat(step=9))], hung=[1]).rank == 1


def test_a_refusal_wins_over_everything_else() -> None:
    refusal = Refusal("step-0000000030.a1", 30, "CorruptCheckpoint", "chunk 3: expected x, found y")
    ranks = [killed(0), raised(1, 1.0), dataclasses.replace(raised(2, 2.0), refusal=refusal)]
    failure = conclude(ranks, hung=[0])
    assert (failure.kind, failure.rank, failure.cause_mono) == (Kind.REFUSED, 2, 2.0)
    assert failure.summary.endswith("refused the checkpoint: chunk 3: expected x, found y")


@pytest.mark.parametrize(
    ("kinds", "rank", "final"),
    [
        (["WorldSizeMismatch", "WorldSizeMismatch"], 0, True),
        (["WorldSizeMismatch", "CorruptCheckpoint"], 1, False),
        (["ModelMismatch", "WorldSizeMismatch"], 0, False),
        (["ObjectMismatch", "ObjectMismatch"], 0, True),
        (["CheckpointError"], 0, False),
    ],
)
def test_only_ranks_know_that_a_checkpoint_cannot_be_dealt_to_them(
    kinds: list[str], rank: int, final: bool
) -> None:
    refusals = [Refusal("step-0000000030.a1", 30, kind, "reason") for kind in kinds]
    ranks = [dataclasses.replace(raised(n, 1.0), refusal=r) for n, r in enumerate(refusals)]
    failure = conclude(ranks)
    assert (failure.rank, failure.final) == (rank, final)


def test_the_traceback_the_code_and_the_time_are_the_roots() -> None:
    failure = conclude([raised(0, 5.0, "later"), raised(1, 4.0, "first", order=1)])
    assert "first" in failure.traceback
    assert (failure.cause_mono, failure.code, failure.signal) == (4.0, 1, None)
    assert conclude([killed(0, 7)]).signal == 7
    assert conclude([gone(0, 93)]).code == 93


def test_the_step_is_the_furthest_ranks() -> None:
    ranks = [dataclasses.replace(killed(0), beat=Beat(step=7)), gone(1, 0)]
    assert conclude(ranks).step == 41
    assert conclude([RankEvidence(0, code=1)]).step == -1


@pytest.mark.parametrize(
    ("beat", "expected"),
    [
        (Beat(), "before its first step"),
        (Beat(phase=Phase.START), "in start-up"),
        (Beat(phase=Phase.RESTORE), "while restoring"),
        (Beat(phase=Phase.RESTORE, step=0), "at step 0, while restoring"),
        (Beat(phase=Phase.SAVE, step=30), "at step 30, while saving"),
    ],
)
def test_where_a_rank_was(beat: Beat, expected: str) -> None:
    assert where(beat) == expected


def test_signals_without_a_name_have_a_number() -> None:
    assert (signal_name(15), signal_name(77)) == ("SIGTERM", "signal 77")


evidence = st.builds(
    RankEvidence,
    rank=st.integers(0, 3),
    code=st.none() | st.integers(0, 255),
    signal=st.none() | st.sampled_from([6, 9, 11, 15]),
    order=st.integers(0, 3),
    by_us=st.booleans(),
    error=st.none() | st.builds(error, st.floats(0, 10)),
)


@given(st.lists(evidence, min_size=1, max_size=4, unique_by=lambda e: e.rank))
def test_the_root_always_is_a_rank_that_failed_by_itself(ranks: list[RankEvidence]) -> None:
    failure = conclude(ranks)
    failed = {e.rank: e for e in ranks if not e.by_us and (e.signal or e.code not in (0, 75, None))}
    assert (failure.rank is None) == (not failed)
    if failure.rank is not None:
        assert failure.rank in failed
        if any(e.signal for e in failed.values()):
            assert failed[failure.rank].signal or failed[failure.rank].code not in (1, None)


def test_a_straggler_that_a_job_ends_attempts_for_is_the_slowest_rank() -> None:
    ranks = [gone(0, None), gone(1, None), gone(2, None)]
    failure = conclude(ranks, slow={1: 2.04, 2: 3.2})
    assert (failure.kind, failure.rank) == (Kind.STRAGGLER, 2)
    assert "3.2 times" in failure.summary


def test_what_autoglm_refused_a_rank_is_a_class_of_its_own_and_says_what_to_do() -> None:
    refused = ErrorRecord("UsageError", "seed was 0 and is 1", "Traceback …\n", 5.0, True, "do it")
    ranks = [raised(1, 4.0, "connection reset by peer"), gone(0, 2, error=refused)]
    failure = conclude([dataclasses.replace(ranks[0], order=1), ranks[1]])
    assert (failure.kind, failure.rank) == (Kind.USAGE_ERROR, 0)
    assert failure.summary.startswith("rank 0 was refused: seed was 0 and is 1 at step 41")
    assert (failure.hint, failure.traceback) == ("do it", "")
    other = dataclasses.replace(refused, misused=False)
    assert conclude([gone(0, 1, error=other)]).kind is Kind.EXCEPTION


def test_no_class_says_of_a_failure_that_is_tried_again_that_this_is_in_vain() -> None:
    for traits in TRAITS.values():
        assert "not help" not in traits.means


def test_the_summary_of_an_exception_names_file_and_line() -> None:
    trace = 'Traceback (most recent call last):\n  File "/x/train.py", line 31, in step\n'
    found = ErrorRecord("ValueError", "bad", trace, 1.0)
    failure = conclude([RankEvidence(0, code=1, beat=BEAT, error=found)], (), "", None)
    assert failure.summary.endswith("at step 41, in backward, at train.py:31 in step")
