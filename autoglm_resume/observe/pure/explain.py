"""A run told attempt by attempt: what failed first, why, what was done, what it cost. Pure.

Journals may be torn, or written by another version: what is not there is left out.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.goodput import Summary, summarize
from autoglm_resume.observe.pure.recovery import Recovery, Rejected, rejected
from autoglm_resume.observe.pure.say import concluded, plural, seconds, sentence, short
from autoglm_resume.observe.pure.segments import Segment, attempts, mono

NOTICED = (
    *(events.WarningGiven, events.PartFailed, events.SaverLost, events.Straggler),
    *(events.ZygoteLost, events.StartedOver, events.ColdStart, events.ReplicaBehind),
    *(
        events.Repaired,
        events.RepairFailed,
        events.Quarantined,
        events.Resharded,
        events.NotifyFailed,
    ),
    *(events.PartlyRestored, events.SpareFailed, events.SaveCutOff, events.JobKept),
    events.JobChanged,
)
"""Events that belong to the story of an attempt without ending it."""
MOST_NOTICED = 8

_FRAME = re.compile(r'^ *File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>.+)$')
_LINE = re.compile(r"\S+:\d+ in ")
_NOT_THE_USERS = re.compile(
    r"(^|/)(site-packages|dist-packages|autoglm_resume|torch)/|/lib/python3|^<|(^|/)runpy\.py"
)


@dataclass(frozen=True)
class Line:
    """Where it happened, as near to the user's own code as is known."""

    place: str
    """“train.py:31 in step”; empty where only the text is known."""
    text: str
    """The code there, or the last line of the log."""
    source: str
    """traceback, stack or log."""


@dataclass(frozen=True)
class Decided:
    """What was decided after a failure."""

    action: str
    delay: float
    reason: str
    breaker: str


@dataclass(frozen=True)
class Story:
    """One attempt."""

    attempt: int
    node: str
    """Of the rank that failed first, else of the supervisor."""
    began: float | None
    """Unix seconds."""
    start_step: int
    checkpoint: str | None
    """What it began with, None for the beginning."""
    rejected: tuple[Rejected, ...]
    """Checkpoints that were not taken for it."""
    last_step: int | None
    outcome: str | None
    """completed, failed, interrupted, lost (its supervisor died), None while it runs."""
    lived: float | None
    """Seconds from its start to its end, or to the last that is known of it."""
    recovery: Recovery | None
    """Its failure and what followed, None if it did not fail."""
    line: Line | None
    evidence: tuple[str, ...]
    decided: Decided | None
    lost_seconds: float | None
    """Training time that the steps took which had to be run again."""
    stopped_by: str
    """The signal by which it was asked to stop."""
    noticed: tuple[str, ...]

    @property
    def title(self) -> str:
        """“attempt 1, from step 40: failed at step 52 after 31.2 s”."""
        text = f"attempt {self.attempt}, from step {self.start_step}"
        reached = "" if self.last_step is None else f" at step {self.last_step}"
        after = "" if self.lived is None else f" after {seconds(self.lived)}"
        if self.outcome is None:
            return f"{text}: running{reached}"
        return f"{text}: {self.outcome}{reached}{after}"

    @property
    def paragraph(self) -> list[tuple[str, str]]:
        """(what is told, the sentences)."""
        told = [*self._beginning(), *self._failure(), *self._answer()]
        if self.stopped_by:
            told.append(("done", f"it was asked to stop by {self.stopped_by}"))
        told += [("noticed", text) for text in self.noticed]
        return told

    def _beginning(self) -> Iterator[tuple[str, str]]:
        if self.rejected:
            yield "began", f"from step {self.start_step}; {_not_taken(self.rejected)}"

    def _failure(self) -> Iterator[tuple[str, str]]:
        if (failure := self.recovery) is None:
            return
        on = f" on {self.node}" if self.node else ""
        what = failure.what
        if failure.rank is not None and f"rank {failure.rank}" not in what:
            what = f"rank {failure.rank}: {what}"
        ordered = f", ordered by --drill {', '.join(failure.drills)}" if failure.drills else ""
        yield "failed", f"{what}{on}{ordered}"
        if self.line is not None:
            known = filter(None, (self.line.place, self.line.text))
            yield "line", ": ".join(known) + f" ({self.line.source})"
        if failure.kind:
            why = "; ".join(self.evidence)
            meaning = "as the drill meant it" if failure.drills else concluded(failure.kind)
            text = f"{failure.kind}: {meaning}"
            yield "concluded", f"{text}. Because {why}" if why else text

    def _answer(self) -> Iterator[tuple[str, str]]:
        if (failure := self.recovery) is None:
            return
        done = []
        if self.decided is not None:
            done.append(short(sentence(events.DecisionMade(**vars(self.decided))) or ""))
            if self.decided.breaker not in ("", "closed"):
                done.append(f"the circuit breaker is {self.decided.breaker}")
        if failure.next_attempt is not None:
            done.append(_went_on(failure))
        if done:
            yield "done", "; ".join(done)
        cost = []
        if failure.phases or failure.total is not None:
            shown = [f"{name} {seconds(took)}" for name, took in failure.phases if took >= 5e-4]
            total = "" if failure.total is None else f"{seconds(failure.total)} until the next step"
            cost.append(": ".join(filter(None, (total, ", ".join(shown)))))
        if failure.lost is not None and failure.next_attempt is not None:
            again = f"{plural(failure.lost, 'step')} run again" if failure.lost else "no step lost"
            about = f", about {seconds(self.lost_seconds)} of training" if self.lost_seconds else ""
            cost.append(again + about)
        if cost:
            yield "cost", "; ".join(filter(None, cost))


@dataclass(frozen=True)
class Explanation:
    """A run."""

    summary: Summary
    now: str
    """One sentence: how it is."""
    stories: tuple[Story, ...]
    pending: tuple[Rejected, ...]
    """What the last gate rejected, if no attempt followed it."""


def explain(
    journal: Iterable[Event],
    *,
    alive: bool = False,
    now: float | None = None,
    step: int | None = None,
) -> Explanation:
    """The run of this journal, oldest event first.

    `alive`: whether a supervisor has the run; `now`: then the monotonic time on its machine;
    `step`: completed steps, where the heartbeats know better than the journal.
    """
    everything = list(journal)
    segments = attempts(everything)
    summary = summarize(everything, alive=alive, now=now)
    hosts = _hosts(everything)
    failures = {recovery.attempt: recovery for recovery in summary.recoveries}
    stories = []
    for index, segment in enumerate(segments):
        before = segments[index - 1] if index else None
        told = before is not None and before.attempt in failures
        last = index == len(segments) - 1
        stories.append(
            _story(
                segment,
                failures.get(segment.attempt),
                hosts.get(segment.attempt, ""),
                () if told else rejected(segment.gate),
                going=last and alive,
            )
        )
    return Explanation(
        summary, state(summary, step), tuple(stories), rejected(_open_gate(everything))
    )


def state(summary: Summary, step: int | None = None) -> str:
    """How a run is, in one sentence; `step` is what is known better than from the journal."""
    step = summary.step if step is None else step
    at = "" if step is None else f" at step {step}"
    why = reason(summary)
    match summary.state:
        case "finished":
            return f"done{at}"
        case "training":
            failures = len(summary.recoveries)
            return f"training{at}" + (f", after {plural(failures, 'failure')}" if failures else "")
        case "interrupted" | "failed" | "dead":
            code = "" if summary.code is None else f" (exit code {summary.code})"
            return f"stopped{at}: {why}{code}"
        case _:
            return f"{summary.state}: {why}" if why else summary.state


def reason(summary: Summary) -> str:
    """Why a run neither trains nor is done, in one sentence; empty if it does or is."""
    last = summary.recoveries[-1].what if summary.recoveries else ""
    match summary.state:
        case "recovering" | "paused":
            after = f"after: {last}" if last and last not in summary.waiting else ""
            return short("; ".join(filter(None, (summary.waiting, after))))
        case "interrupted" | "failed":
            return short(summary.reason or "no reason was recorded")
        case "dead" if summary.attempts:
            saved = summary.checkpoint_step
            begin = "the beginning" if saved is None else f"step {saved}"
            return f"its supervisor died; `autoglm resume` continues from {begin}"
        case "dead":
            return "its supervisor died before the first attempt"
        case _:
            return ""


def frames(traceback: str) -> list[tuple[str, str]]:
    """(“file:line in function”, the code there) of a Python traceback, innermost last."""
    found: list[tuple[str, str]] = []
    lines = traceback.splitlines()
    for line, following in itertools.pairwise([*lines, ""]):
        if match := _FRAME.match(line):
            code = "" if _FRAME.match(following) else following.strip()
            found.append((f"{match['file']}:{match['line']} in {match['function']}", code))
    return found


def line_of(failure: events.GroupFailed) -> Line | None:
    """The line that a failure event points to: the traceback's, the stack's, or the log's last."""
    told = frames(failure.traceback)
    if told:
        own = [frame for frame in told if not _NOT_THE_USERS.search(frame[0])]
        place, code = (own or told)[-1]
        return Line(place, code, "traceback")
    # The suspect's Python stack, innermost frame first.
    stack = failure.stacks.get(-1 if failure.root_rank is None else failure.root_rank)
    if stack:
        own_frame = next((frame for frame in stack if not _NOT_THE_USERS.search(frame)), stack[0])
        inside = f"inside {stack[0]}" if own_frame != stack[0] else ""
        return Line(own_frame, inside, "stack")
    tail = [line.strip() for line in failure.tail.splitlines() if line.strip()]
    # “SIGKILL at step 20, in backward” is no line: the summary says so already.
    place = failure.place if _LINE.match(failure.place) else ""
    if not tail and not place:
        return None
    return Line(place, tail[-1][:300] if tail else "", "log" if tail else "evidence")


def _story(
    segment: Segment,
    recovery: Recovery | None,
    host: str,
    not_taken: tuple[Rejected, ...],
    *,
    going: bool,
) -> Story:
    failure = segment.last(events.GroupFailed)
    ended = segment.last(events.AttemptEnded)
    decision = segment.last(events.DecisionMade)
    stop = segment.last(events.StopRequested)
    outcome = (ended and ended.outcome) or (
        "failed" if failure else "lost" if recovery is not None or not going else None
    )
    times = [mono(event) for event in ([ended] if ended else segment.events) if mono(event)]
    began = mono(segment.started)
    return Story(
        attempt=segment.attempt,
        node=_node(failure, host),
        began=segment.started.time,
        start_step=segment.start_step,
        checkpoint=segment.started.resume,
        rejected=not_taken,
        last_step=segment.last_step,
        outcome=outcome,
        lived=max(0.0, max(times) - began) if times and began else None,
        recovery=recovery,
        line=line_of(failure) if failure else None,
        evidence=tuple(map(short, failure.evidence)) if failure else (),
        decided=_decided(decision) if decision else None,
        lost_seconds=_lost(segment, recovery),
        stopped_by=stop.by if stop and not failure else "",
        noticed=_noticed(segment),
    )


def _decided(decision: events.DecisionMade) -> Decided:
    return Decided(decision.action, decision.delay, decision.reason, decision.breaker)


def _node(failure: events.GroupFailed | None, host: str) -> str:
    """Of the rank that failed first, where ranks say theirs."""
    ranks = failure.ranks if failure else ()
    nodes = (rank.node for rank in ranks if failure and rank.rank == failure.root_rank)
    return next(nodes, "") or host


def _hosts(journal: Iterable[Event]) -> dict[int, str]:
    """Host of the supervisor that began each attempt."""
    hosts: dict[int, str] = {}
    host = ""
    for event in journal:
        match event:
            case events.RunStarted() | events.SupervisorStarted():
                host = event.host
            case events.AttemptStarted(attempt=attempt):
                hosts.setdefault(attempt or 0, host)
    return hosts


def _open_gate(journal: Iterable[Event]) -> events.GatePassed | None:
    """The last gate, unless an attempt went through it."""
    gate: events.GatePassed | None = None
    for event in journal:
        match event:
            case events.GatePassed():
                gate = event
            case events.AttemptStarted() | events.JobKept():
                gate = None
    return gate


def _lost(segment: Segment, recovery: Recovery | None) -> float | None:
    if recovery is None or not recovery.lost or recovery.from_step is None:
        return None
    end = segment.reached(recovery.at_step or 0)
    begin = segment.reached(recovery.from_step)
    return None if begin is None or end is None or end <= begin else end - begin


def _noticed(segment: Segment) -> tuple[str, ...]:
    """Each once, with how often."""
    said = Counter(text for e in segment.all(*NOTICED) if (text := sentence(e)))
    told = [text if n == 1 else f"{text} ({n} times)" for text, n in said.items()]
    more = len(told) - MOST_NOTICED
    return (*told[:MOST_NOTICED], *([f"and {more} more"] if more > 0 else []))


def _not_taken(checkpoints: Sequence[Rejected]) -> str:
    return "; ".join(f"checkpoint step {no.step} rejected: {no.reason}" for no in checkpoints)


def _went_on(failure: Recovery) -> str:
    if failure.checkpoint is None:
        taken = f"attempt {failure.next_attempt} began at step {failure.from_step or 0}, "
        taken += "without a checkpoint"
    else:
        newest = "the newest acceptable" if failure.rejected else "the newest"
        checks = f", accepted on {', '.join(failure.checks)}" if failure.checks else ""
        taken = f"attempt {failure.next_attempt} took checkpoint step {failure.from_step} "
        taken += f"({newest}{checks})"
    return "; ".join(filter(None, (taken, _not_taken(failure.rejected))))
