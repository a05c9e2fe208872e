"""Any sequence of failures, clocks and lives of a supervisor: decisions keep their promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.failures import TRAITS, Answer, Kind
from autoglm_resume.supervise.core import policy
from autoglm_resume.supervise.core.failure import Failure
from autoglm_resume.supervise.core.history import recall
from autoglm_resume.supervise.core.policy import (
    Ended,
    GiveUp,
    Pause,
    Requeue,
    RestartGroup,
    RollBack,
    Rules,
    Smaller,
)

IDS = ("step-0000000010.a0", "step-0000000020.a0", "step-0000000030.a0")
PLACES = ("", "train.py:3 in f", "train.py:9 in g")
FREE = {kind for kind in Kind if TRAITS[kind].free}
HEALED_BY_TIME = [kind for kind in Kind if TRAITS[kind].heals]
FINAL = {Kind.REFUSED, Kind.USAGE_ERROR}
ERRORS = [kind for kind in Kind if kind not in FREE | FINAL]
RANKS = 4

rules = st.builds(
    Rules,
    max_restarts=st.sampled_from((0, 4, 1000, 1000)),
    backoff=st.just(1.0),
    max_backoff=st.just(8.0),
    without_progress=st.integers(1, 4),
    cool_down=st.sampled_from((0.0, 100.0)),
    cool_downs=st.integers(0, 3),
    failures=st.sampled_from((5, 1000, 1000, 1000)),
    within=st.just(50.0),
    longest_pause=st.just(1000.0),
    on=st.dictionaries(
        st.sampled_from([*(kind.value for kind in ERRORS), "17", "/nan/"]),
        st.sampled_from([answer for answer in Answer if answer is not Answer.STOP]),
        max_size=2,
    ),
    scheduler=st.booleans(),
    can_shrink=st.booleans(),
)


class Run(RuleBasedStateMachine):
    """A run as its supervisor, its journal and its operator see it."""

    @initialize(rules=rules)
    def begin(self, rules: Rules) -> None:
        self.rules = rules
        self.now = 1e6
        self.mono = 0.0
        self.ranks = RANKS
        self.journal: list[Event] = []
        self.history: list[Ended] = []
        self.furthest = self.checkpointed = 0
        self.saved: set[int] = set()
        self.over = False
        self.idle = 0
        """Attempts without progress, but for what a scheduler took."""
        self.waited = 0.0
        """Seconds without progress."""

    def tell(self, event: str, **fields: Any) -> None:
        self.journal.append(events.read({"event": event, "time": self.now, **fields}))

    @property
    def at(self) -> int:
        """The newest checkpoint's step: the gate is passed before every start."""
        return max(self.saved, default=0)

    def fail(self, failure: Failure, ran: int, saves: bool) -> policy.Decision:
        """One attempt from the gate to the decision, live and from the journal alike."""
        rules = replace(self.rules, can_shrink=self.rules.can_shrink and self.ranks > 1)
        began, step = self.at, self.at + ran if ran else -1
        self.tell("attempt_started", attempt=len(self.history), step=began)
        if saves and ran:
            self.saved.add(step)
            self.checkpointed = max(self.checkpointed, step)
            self.tell("committed", step=step, objects={})
        self.tell(
            "failure",
            kind=failure.kind.value,
            place=failure.place,
            step=step,
            refused=failure.refused,
        )
        ended = Ended(
            began,
            step,
            self.checkpointed,
            None,
            failure.refused,
            failure.kind,
            failure.place,
            self.now,
        )
        self.history.append(ended)
        decision = policy.decide(self.history, failure, rules, self.now, 0.5)
        recalled = recall(self.journal).ended
        assert recalled == tuple(self.history)
        assert policy.decide(recalled, failure, rules, self.now, 0.5) == decision
        self.tell("decision", action=decision.action, delay=decision.delay, reason=decision.reason)
        self.history[-1] = replace(ended, action=decision.action)
        self.count(failure, step)
        self.obey(decision)
        return decision

    def count(self, failure: Failure, step: int) -> None:
        taken = failure.kind in FREE and self.rules.scheduler
        if step > self.furthest:
            self.idle, self.waited = 0, 0.0
        elif not taken:
            self.idle += 1
        self.furthest = max(self.furthest, step)

    def obey(self, decision: policy.Decision) -> None:
        assert 0 <= decision.delay <= max(self.rules.max_backoff, self.rules.cool_down)
        self.waited += decision.delay
        match decision:
            case GiveUp():
                assert decision.code in (1, 90)
                self.over = True
            case Pause():
                self.waited += decision.longest
            case Smaller():
                assert self.ranks > 1
                self.ranks -= 1
            case Requeue():
                assert self.rules.scheduler
                self.history = list(recall(self.journal).ended)
            case RollBack(before=before):
                older = [step for step in self.saved if step < (before or self.at)]
                if older:  # as Gatekeeper.go_back has it
                    self.saved = set(older)
                    self.checkpointed = max(older)
                    self.tell("branched", step=max(older), attempt=len(self.history), reason="nan")

    @precondition(lambda self: not self.over)
    @rule(
        kind=st.sampled_from(ERRORS),
        place=st.sampled_from(PLACES),
        ran=st.integers(0, 12),
        saves=st.booleans(),
        code=st.sampled_from((None, 1, 17)),
        words=st.sampled_from(("", "the loss is nan")),
    )
    def dies(
        self, kind: Kind, place: str, ran: int, saves: bool, code: int | None, words: str
    ) -> None:
        failure = Failure(kind, 0, f"rank 0 {words}", ran, code=code, place=place)
        progress = self.at + ran > self.furthest and ran > 0
        decision = self.fail(failure, ran, saves)
        if isinstance(decision, RestartGroup | RollBack):
            assert not progress or decision.delay == 0, "the first restart after it is immediate"

    @precondition(lambda self: not self.over)
    @rule(
        kinds=st.lists(st.sampled_from([*ERRORS, *sorted(FREE, key=str)]), min_size=1, max_size=3),
        place=st.sampled_from(PLACES),
        ran=st.integers(0, 1),
    )
    def never_comes_further(self, kinds: list[Kind], place: str, ran: int) -> None:
        most = 2 * (self.rules.without_progress + self.rules.cool_downs) + RANKS + len(IDS) + 2
        for kind in kinds * most:
            if not self.over:
                self.fail(Failure(kind, 0, "rank 0 died", 1, code=1, place=place), ran, False)
                self.ends()
        taken = self.rules.scheduler and set(kinds) <= FREE
        assert self.over or taken, "only a scheduler may go on for ever"

    @precondition(lambda self: not self.over)
    @rule(kind=st.sampled_from(HEALED_BY_TIME), times=st.integers(1, 20))
    def saves_before_each_death(self, kind: Kind, times: int) -> None:
        """Progress always refills; only the window may end this, and no restarts at all."""
        for _ in range(times):
            self.now += self.rules.within + 1
            ran = max(self.best, self.furthest) - self.at + 1
            decision = self.fail(Failure(kind, 0, "rank 0 died", 1), ran, saves=True)
            self.over = self.over and self.rules.max_restarts == 0
            assert isinstance(decision, GiveUp) == self.over

    @property
    def best(self) -> int:
        """The furthest checkpoint ever, those that were left behind included."""
        return max((each.checkpointed for each in self.history), default=0)

    @precondition(lambda self: not self.over)
    @rule(
        kind=st.sampled_from([Kind.PREEMPTED, Kind.STOPPED]),
        ran=st.integers(0, 3),
        saves=st.booleans(),
    )
    def is_preempted(self, kind: Kind, ran: int, saves: bool) -> None:
        decision = self.fail(Failure(kind, 0, "preempted", ran), ran, saves)
        if self.rules.scheduler:
            assert isinstance(decision, Requeue)

    @precondition(lambda self: not self.over)
    @rule(id=st.sampled_from(IDS), final=st.booleans())
    def refuses(self, id: str, final: bool) -> None:
        before = [each.refused for each in self.history]
        failure = Failure(Kind.REFUSED, 0, "refused", -1, refused=id, final=final)
        decision = self.fail(failure, 0, False)
        assert isinstance(decision, GiveUp) == (final or id in before)

    @precondition(lambda self: not self.over)
    @rule()
    def supervisor_dies(self) -> None:
        self.history = list(recall(self.journal).ended)

    @rule(by=st.floats(-1e5, 1e5))
    def clock_jumps(self, by: float) -> None:
        self.now += by

    @invariant()
    def ends(self) -> None:
        if hasattr(self, "rules"):
            tries = self.rules.without_progress + self.rules.cool_downs
            most = 2 * tries + RANKS + len(IDS)
            assert self.idle <= most + 1
            longest = max(self.rules.max_backoff, self.rules.cool_down, self.rules.longest_pause)
            assert self.waited <= (most + 1) * longest


TestRun = pytest.mark.slow(Run.TestCase)
TestRun.settings = settings(max_examples=50, stateful_step_count=40)


@given(
    rules=rules,
    attempts=st.lists(
        st.tuples(st.sampled_from(ERRORS), st.integers(-1, 30), st.integers(0, 30)), min_size=1
    ),
    at=st.integers(0, 30),
    times=st.integers(1, 9),
)
def test_preemptions_that_came_before_change_no_decision(
    rules: Rules, attempts: list[tuple[Kind, int, int]], at: int, times: int
) -> None:
    history = [Ended(0, step, saved, kind=kind, place="x") for kind, step, saved in attempts]
    before = history[: min(at, len(history) - 1)]
    free = Ended(0, -1, 0, kind=Kind.PREEMPTED)
    failure = Failure(history[-1].kind, 0, "died", 1, place="x")
    with_them = [*before, *[free] * times, *history[len(before) :]]
    assert policy.decide(with_them, failure, rules, 0.0, 0.5) == policy.decide(
        history, failure, rules, 0.0, 0.5
    )
