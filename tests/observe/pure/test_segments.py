from __future__ import annotations

import pytest

from autoglm_resume import events
from autoglm_resume.observe.pure import segments
from tests.observe.runs import Script, killed_once


def test_a_supervisor_and_what_introduces_it_are_one_life() -> None:
    run = Script().life().at(5).say("run_interrupted", code=75).at(9).life(resumed=True)
    first, second = segments.lives(run.events)
    assert [e.event for e in first.events][:2] == ["run_started", "supervisor_started"]
    assert (first.boot, first.begin, first.end) == ("boot-1", 0.0, 5.0)
    assert second.begin == 9.0


def test_a_journal_without_its_beginning_still_has_lives_and_attempts() -> None:
    journal = [e for e in killed_once().events if not isinstance(e, events.RunStarted)][1:]
    assert len(segments.lives(journal)) == 1
    assert [s.attempt for s in segments.attempts(journal)] == [0, 1]


def test_what_a_rank_says_before_its_attempt_is_announced_belongs_to_it() -> None:
    first, second = segments.attempts(killed_once().events)
    assert len(first.all(events.RankStarted)) == len(second.all(events.RankStarted)) == 2


def test_what_a_rank_says_late_belongs_to_its_own_attempt() -> None:
    run = killed_once().say("save_failed", attempt=0, rank=1, step=6)
    first, second = segments.attempts(run.events)
    assert first.last(events.PartFailed)
    assert not second.last(events.PartFailed)


def test_a_gate_opens_the_attempt_after_it() -> None:
    first, second = segments.attempts(killed_once().events)
    assert first.gate
    assert first.gate.accepted is None
    assert second.gate
    assert second.gate.step == 4


def test_moments_between_known_steps_are_estimated() -> None:
    first, _ = segments.attempts(killed_once().events)
    assert first.reached(4) == 16.0
    assert first.reached(1) == 13.0
    assert first.reached(5) == pytest.approx((16.0 + 18.1) / 2)
    assert first.reached(99) == 18.1


def test_a_step_below_zero_is_no_step() -> None:
    assert segments.step_of(events.GroupFailed(step=-1)) is None
