"""What people read about an event: the one place of wording. Pure.

Journals may be torn, or written by another version: unknown events say nothing, and what a known
one lacks is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.failures import TRAITS, known

_DIGEST = re.compile(r"\b(blake3:[0-9a-f]{12})[0-9a-f]{52}\b")


_SECOND = ": saving after this step, then stopping; a second Ctrl-C stops at once, without a save"
LINE = 200
"""Characters of a text that is to be one line."""
SHORT = 60
"""Characters of what is repeated rather than referred to."""


def sentence(event: Event) -> str | None:
    """What `event` means to a person, None if nothing; several lines where it says several things.

    Only rank 0 speaks for what all ranks do at the same time.
    """
    return (_of_attempts(event) or _of_checkpoints(event) or _of_the_run(event)) or None


def seconds(value: float | None) -> str:
    """“38 ms”, “1.02 s”, “63 s”, “12m 05s”, “3h 20m”; “?” where it is not known."""
    if value is None:
        return "?"
    if value < 0.9995:
        return f"{value * 1e3:.0f} ms"
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 99.5:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def size(count: int) -> str:
    """“1.5 MiB”."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plural(count: int, thing: str) -> str:
    """“1 rank”, “2 ranks”."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def short(text: str) -> str:
    """`text` with every digest cut to what the eye can compare."""
    return _DIGEST.sub(r"\1…", text)


def brief(text: str) -> str:
    """`text` where only one line is to be had: the first, and of a long one the beginning."""
    first, more, _ = text.partition("\n")
    if len(first) > LINE:
        first, more = first[:LINE].rpartition(" ")[0] or first[:LINE], "…"
    return f"{first.rstrip(';:, ')} …" if more else first


def check(made: events.CheckMade) -> str:
    """A gate's check that failed: which, what was expected, what was found."""
    if made.name == "integrity" and made.detail:
        return short(f"integrity: {made.detail}")
    text = f"{made.name}: expected {made.expected}, found {made.found}"
    return short(f"{text}: {made.detail}" if made.detail else text)


def rejection(verdict: events.Judged) -> str:
    """Why the gate would not take a checkpoint."""
    failed = [check(made) for made in verdict.checks if not made.ok]
    return "; ".join(failed) or short(verdict.reason or "no reason was recorded")


def concluded(kind: str) -> str:
    """What a failure class, by its name in the journal, means."""
    found = known(kind)
    return TRAITS[found].means if found else kind.replace("_", " ")


def failed(failure: events.GroupFailed) -> str:
    """What a failure event says died, and of what."""
    said = failure.summary or "the worker group failed"
    kind = known(failure.kind)
    called = TRAITS[kind].called if kind else ""
    return short(f"{called}: {said}" if called else said)


def slurm_job(job: events.Slurm) -> str:
    """Which job of Slurm a run is in."""
    where = f" on {job.node}" if job.node else ""
    again = f", requeued {plural(job.restarts, 'time')}" if job.restarts else ""
    return f"job {_or_unknown(job.job)}{where}{again}"


def _or_unknown(value: object) -> object:
    return "?" if value is None else value


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _of_the_run(event: Event) -> str:
    match event:
        case events.RunStarted():
            return (
                f"run {event.name}: {plural(event.world_size or 1, 'rank')}, "
                f"{event.launcher} launcher, supervisor {_or_unknown(event.pid)} on {event.host}"
            )
        case events.SupervisorStarted(resumed=True, pid=pid):
            return f"continuing the run (supervisor {_or_unknown(pid)})"
        case events.Slurm():
            return f"Slurm {slurm_job(event)}"
        case events.TimeLimitKnown(seconds=left, lead=lead):
            ahead = f"the run stops {seconds(lead)} before that"
            return f"the job's time ends in {seconds(left)}; {ahead}"
        case events.ZygoteReady(skipped=skipped):
            without = f", without {_list(skipped)}" if skipped else ""
            return f"warm launcher ready in {seconds(event.seconds)}{without}"
        case events.ZygoteLost(reason=reason):
            return f"the warm launcher is gone: {reason}"
        case events.StartedOver(rank=0, reason=reason):
            return f"rank 0 starts over with nothing imported ahead: {reason}"
        case events.ColdStart(reason=reason):
            return f"starting cold: {reason}"
        case events.SpareFailed(reason=reason):
            return f"a warm spare died: {short(reason)}"
        case events.NotifyFailed(target=target, reason=reason):
            return f"nobody could be told through {target}: {reason}"
        case events.SaveInterval(reason=reason):
            return f"saving {reason or '?'}"
        case events.StopRequested(by=by):
            return f"stop requested by {by}{_SECOND if by == 'SIGINT' else ''}"
        case events.WarningGiven(text=text):
            return short(text)
        case events.BegunFrom(path=path, step=step, only=only):
            what = ", ".join(only) or "all objects"
            return f"{what} from {path} (step {step}, verified); the run begins at step 0"
        case events.JobChanged(changes=changes, finished=finished):
            what = "the finished run goes on" if finished else "the job is another one now"
            return short(f"{what}: {'; '.join(changes)}")
        case events.JobKept(reason=reason):
            return f"a start with another job was refused, the run keeps its own: {short(reason)}"
        case events.RunCompleted(step=step):
            # A script without a session never says its step.
            at = "" if step == -1 else f" at step {_or_unknown(step)}"
            return f"run completed{at} in {seconds(event.seconds)}"
        case events.RunInterrupted(reason=reason):
            return f"interrupted: {reason or 'asked to stop'}"
        case events.RunFailed(reason=reason, hint=hint):
            text = f"run failed: {short(reason or '?')}"
            return f"{text} (hint: {hint})" if hint else text
    return ""


def _of_checkpoints(event: Event) -> str:
    step = _or_unknown(getattr(event, "step", None))
    match event:
        case events.GatePassed():
            return _gate(event)
        case events.Quarantined():
            return f"checkpoint step {step} moved to quarantine"
        case events.Committed():
            return f"checkpoint step {step} committed"
        case events.SaveRequested(step=None, reason=reason):
            return f"not saving, though asked: {reason or 'the ranks cannot save now'}"
        case events.SaveRequested():
            return f"saving after step {step}, as asked"
        case events.PartFailed(rank=rank, reason=reason):
            return (
                f"rank {_or_unknown(rank)} could not save step {step}: {reason}; training goes on"
            )
        case events.SaveCutOff(missing=missing):
            ranks = f"rank{'s' if len(missing) > 1 else ''} {_list(missing) or '?'}"
            return f"save of step {step} cut off: {ranks} had no snapshot of it yet"
        case events.SaveSkipped(reason=reason):
            return f"no save after step {step}: {reason}"
        case events.SaverLost(rank=rank):
            return f"rank {_or_unknown(rank)}'s saver died and was replaced"
        case events.Branched(reason=reason):
            return f"going back to step {step}" + (f": {reason}" if reason else ", as asked")
        case events.BroughtBack(id=id):
            return f"{id} brought back from a replica"
        case events.ReplicaBehind(replica=replica, reason=reason):
            return f"replica {replica} is behind: {short(reason)}"
        case events.ReplicaCaughtUp(replica=replica):
            return f"replica {replica} has caught up"
        case events.ReplicasFlushed(behind=behind) if behind:
            return f"not everything is copied to {_list(behind)}"
        case events.Repaired(id=id, files=files):
            return f"{id} repaired from a replica: {_list(files)}"
        case events.RepairFailed(id=id, reason=reason):
            return f"{id} not repaired: {short(reason)}"
        case events.Refused(rank=rank, reason=reason):
            return short(f"rank {_or_unknown(rank)} refused checkpoint step {step}: {reason}")
        case events.Resharded(global_batch=batch):
            before, now = _or_unknown(event.from_), _or_unknown(event.to)
            text = f"{before} ranks in the checkpoint, {now} now: resharded"
            return f"{text}; a step takes {batch} samples from now on" if batch else text
        case events.PartlyRestored():
            lists = {name: value for name, value in vars(event).items() if type(value) is tuple}
            said = "; ".join(f"{name} {_list(value)}" for name, value in lists.items() if value)
            return short(f"checkpoint step {step} restored in part: {said}")
    return ""


def _gate(gate: events.GatePassed) -> str:
    lines = []
    before = ""
    for verdict in gate.verdicts:
        step = _or_unknown(verdict.step)
        if verdict.accepted:
            names = ", ".join(made.name for made in verdict.checks)
            lines.append(f"checkpoint step {step} accepted ({names})")
        else:
            why = rejection(verdict)
            said = "for the same reason" if why == before and len(why) > SHORT else why
            lines.append(f"checkpoint step {step} rejected: {said}")
            before = why
    if gate.verdicts and gate.accepted is None:
        lines.append(f"none of {plural(len(gate.verdicts), 'checkpoint')} is acceptable")
    return "\n".join(lines)


def _of_attempts(event: Event) -> str:
    match event:
        case events.AttemptStarted(attempt=attempt, step=step):
            if attempt:
                return f"restarting from step {step} (attempt {attempt})"
            return f"starting from step {step}"
        case events.FirstStep(rank=0 | None, step=step):
            return f"step {_or_unknown(step)} is complete: training"
        case events.StateRestored(rank=0 | None, step=step, memory=memory):
            source = " from memory" if memory else ""
            return f"restored step {_or_unknown(step)}{source} in {seconds(event.seconds)}"
        case events.Stopped(rank=0 | None, step=step, unsaved=unsaved):
            after = f"stopped after step {_or_unknown(step)}"
            return f"{after}, which was not saved: {short(unsaved)}" if unsaved else after
        case events.Straggler(rank=rank, ratio=ratio):
            much = "" if ratio is None else f" {ratio:.1f} times"
            return f"rank {_or_unknown(rank)} is{much} slower than its peers"
        case events.DrillFired():
            return f"drill: {_drill(event)}"
        case events.GroupFailed(cause_mono=None):
            return failed(event)
        case events.GroupFailed(cause_mono=cause, mono=mono):
            took = 0.0 if mono is None or cause is None else max(0.0, mono - cause)
            return f"{failed(event)}, detected after {seconds(took)}"
        case events.DecisionMade():
            return _decision(event)
        case events.WaitingOn(reason=reason):
            return f"waiting {seconds(event.seconds)} more: {reason}"
        case events.Paused(reason=reason):
            return f"waiting: {reason}"
        case events.PauseEnded(problem=problem):
            after = f"after {seconds(event.seconds)}"
            return f"no longer waiting, {after}: {problem}" if problem else f"going on {after}"
        case events.Excluded(rank=rank, gpu=gpu, host=host):
            whose = "" if gpu is None else f"'s GPU {gpu}"
            return f"going on without rank {rank}{whose} on {host}"
    return ""


def _drill(drill: events.DrillFired) -> str:
    whom = "every rank" if drill.rank is None else f"rank {drill.rank}"
    at = "" if drill.step is None else f" at step {drill.step}"
    match drill.kind:
        case "kill" | "random":
            return f"SIGKILL to {whom}{at}"
        case "stop":
            return f"SIGSTOP to {whom}{at}"
        case "exit":
            return f"{whom} is to exit{at}"
        case "corrupt":
            return f"flipping a bit in {drill.target or 'a checkpoint'}{at}"
    return f"{drill.spec}{at}"


_UNTIL = {"space": "there is space", "storage": "the storage answers"}
_ACTIONS = {
    "give_up": "giving up",
    "restart": "restarting",
    "roll_back": "restarting from an older checkpoint",
    "smaller": "restarting without that rank's GPU",
    "pause": "pausing",
    "requeue": "ending, to be started again elsewhere",
}


def _decision(decision: events.DecisionMade) -> str:
    action = decision.action or "restart"
    when = f" in {seconds(decision.delay)}" if decision.delay > 0 else " at once"
    if action == "pause":
        when = f" until {_UNTIL.get(decision.until, 'it can go on')}"
    elif action in ("give_up", "requeue"):
        when = ""
    return f"{_ACTIONS.get(action, action)}{when}: {short(decision.reason)}"
