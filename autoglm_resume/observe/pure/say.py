"""What people read about an event: the one place of wording. Pure.

Journals may be torn, or written by another version: unknown events say nothing, and what a known
one lacks is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from autoglm_resume.failures import Kind
from autoglm_resume.journal import Event

_DIGEST = re.compile(r"\b(blake3:[0-9a-f]{12})[0-9a-f]{52}\b")


def sentence(event: Event) -> str | None:
    """What `event` means to a person, None if nothing; several lines where it says several things.

    Only rank 0 speaks for what all ranks do at the same time.
    """
    say = _SAY.get(event.get("event", ""))
    return (say(event) or None) if say else None


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


def entries(value: object) -> list[dict[str, Any]]:
    """The objects in a list of a journal, none if it is no such list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def check(found: dict[str, Any]) -> str:
    """A gate's check that failed: which, what was expected, what was found."""
    detail = str(found.get("detail") or "")
    if found.get("name") == "integrity" and detail:
        return short(f"integrity: {detail}")
    text = f"{found.get('name')}: expected {found.get('expected')}, found {found.get('found')}"
    return short(f"{text}: {detail}" if detail else text)


def rejection(verdict: dict[str, Any]) -> str:
    """Why the gate would not take a checkpoint."""
    failed = [check(c) for c in entries(verdict.get("checks")) if not c.get("ok")]
    return "; ".join(failed) or short(str(verdict.get("reason", "no reason was recorded")))


_CONCLUDED = {
    Kind.KILLED: "a signal from outside ended it, and nothing says who sent it",
    Kind.CRASHED: "it crashed: the signal was of its own making",
    Kind.EXITED: "it exited by itself, with an exit code and no exception",
    Kind.EXCEPTION: "an exception that no other class claims",
    Kind.CODE_ERROR: "the code fails at the same place each time; running it again will not help",
    Kind.LAUNCH: "the script could not be imported or started",
    Kind.CUDA_OOM: "the GPU's memory was full",
    Kind.HOST_OOM: "the host's memory was full",
    Kind.COMMUNICATION: "the ranks lost each other, and none of them failed by itself",
    Kind.GPU_FAULT: "the GPU or its driver failed",
    Kind.HANG: "it made no progress for longer than its own pace allows",
    Kind.STRAGGLER: "it was much slower than its peers for too long",
    Kind.DIVERGED: "the loss is not a number, or leapt",
    Kind.DATA_ERROR: "the data could not be read",
    Kind.DISK_FULL: "the disk was full",
    Kind.STORAGE: "the storage did not answer",
    Kind.REFUSED: "the rank would not load the checkpoint that the gate had accepted",
    Kind.PORT: "somebody else had the port",
    Kind.PREEMPTED: "the scheduler took the machine",
    Kind.STOPPED: "a person stopped it",
    Kind.UNKNOWN: "the evidence fits no class",
}


def concluded(kind: str) -> str:
    """What a failure class, by its name in the journal, means."""
    known = {each.value: text for each, text in _CONCLUDED.items()}
    return known.get(kind) or kind.replace("_", " ")


def _run_started(e: Event) -> str:
    return (
        f"run {e.get('name', '?')}: {plural(e.get('world_size', 1), 'rank')}, "
        f"{e.get('launcher', 'warm')} launcher, supervisor {e.get('pid', '?')} "
        f"on {e.get('host', '?')}"
    )


def _supervisor_started(e: Event) -> str:
    return f"continuing the run (supervisor {e.get('pid', '?')})" if e.get("resumed") else ""


def slurm_job(e: Event) -> str:
    """Which job of Slurm a run is in."""
    restarts, node = e.get("restarts") or 0, e.get("node")
    where = f" on {node}" if node else ""
    again = f", requeued {plural(restarts, 'time')}" if restarts else ""
    return f"job {e.get('job', '?')}{where}{again}"


def _time_limit(e: Event) -> str:
    left, ahead = seconds(e.get("seconds")), seconds(e.get("lead"))
    return f"the job's time ends in {left}; the run stops {ahead} before that"


def _zygote_ready(e: Event) -> str:
    skipped = ", ".join(map(str, e.get("skipped") or ()))
    without = f", without {skipped}" if skipped else ""
    return f"warm launcher ready in {seconds(e.get('seconds'))}{without}"


def _gate(e: Event) -> str:
    lines = []
    verdicts = entries(e.get("verdicts"))
    for verdict in verdicts:
        step = verdict.get("step", "?")
        if verdict.get("accepted"):
            names = ", ".join(str(c.get("name")) for c in entries(verdict.get("checks")))
            lines.append(f"checkpoint step {step} accepted ({names})")
        else:
            lines.append(f"checkpoint step {step} rejected: {rejection(verdict)}")
    if verdicts and e.get("accepted") is None:
        lines.append(f"none of {plural(len(verdicts), 'checkpoint')} is acceptable")
    return "\n".join(lines)


def _attempt_started(e: Event) -> str:
    step = e.get("step", 0)
    cold = ", cold start" if e.get("cold") else ""
    if e.get("attempt", 0):
        return f"restarting from step {step} (attempt {e['attempt']}{cold})"
    return f"starting from step {step}{cold}"


def _first_step(e: Event) -> str:
    return f"step {e.get('step', '?')} is complete: training" if e.get("rank", 0) == 0 else ""


def _restored(e: Event) -> str:
    if e.get("rank", 0) != 0:
        return ""
    source = " from memory" if e.get("memory") else ""
    return f"restored step {e.get('step', '?')}{source} in {seconds(e.get('seconds'))}"


def _save_failed(e: Event) -> str:
    return (
        f"rank {e.get('rank', '?')} could not save step {e.get('step', '?')}: "
        f"{e.get('reason', 'no reason was recorded')}; training goes on"
    )


def _save_cut_off(e: Event) -> str:
    missing = e.get("missing")
    ranks = missing if isinstance(missing, list) and missing else ["?"]
    lacking = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_list(ranks)}"
    return f"save of step {e.get('step', '?')} cut off: {lacking} had no snapshot of it yet"


def _refused(e: Event) -> str:
    return short(
        f"rank {e.get('rank', '?')} refused checkpoint step {e.get('step', '?')}: "
        f"{e.get('reason', 'no reason was recorded')}"
    )


def _save_requested(e: Event) -> str:
    if e.get("step") is None:
        return f"not saving, though asked: {e.get('reason', 'the ranks cannot save now')}"
    return f"saving after step {e['step']}, as asked"


def _stopped(e: Event) -> str:
    return f"stopped after step {e.get('step', '?')}" if e.get("rank", 0) == 0 else ""


def _drill(e: Event) -> str:
    rank = e.get("rank")
    whom = "every rank" if rank is None else f"rank {rank}"
    step = e.get("step")
    at = "" if step is None else f" at step {step}"
    what = {
        "kill": f"SIGKILL to {whom}{at}",
        "random": f"SIGKILL to {whom}{at}",
        "stop": f"SIGSTOP to {whom}{at}",
        "exit": f"{whom} is to exit{at}",
        "corrupt": f"flipping a bit in {e.get('target', 'a checkpoint')}{at}",
    }.get(str(e.get("kind")), f"{e.get('spec', '?')}{at}")
    return f"drill: {what}"


_CLASSES = {
    Kind.CODE_ERROR: "the same error as before, without progress",
    Kind.LAUNCH: "the script did not start",
    Kind.CUDA_OOM: "out of GPU memory",
    Kind.HOST_OOM: "out of host memory",
    Kind.COMMUNICATION: "the ranks lost each other",
    Kind.GPU_FAULT: "GPU fault",
    Kind.DIVERGED: "the training diverged",
    Kind.DATA_ERROR: "data error",
    Kind.DISK_FULL: "disk full",
    Kind.STORAGE: "storage failed",
    Kind.PORT: "port in use",
    Kind.PREEMPTED: "preempted",
}
"""Of classes that the sentence itself does not name."""


def failed(e: Event) -> str:
    """What a failure event says died, and of what."""
    said = str(e.get("summary") or "the worker group failed")
    words = next((_CLASSES.get(kind) for kind in Kind if kind.value == e.get("kind")), None)
    return short(f"{words}: {said}" if words else said)


def _failure(e: Event) -> str:
    cause = e.get("cause_mono")
    if cause is None:
        return failed(e)
    return f"{failed(e)}, detected after {seconds(max(0.0, e.get('mono', cause) - cause))}"


_UNTIL = {"space": "there is space", "storage": "the storage answers"}


def _decision(e: Event) -> str:
    action = str(e.get("action") or "restart")
    delay = e.get("delay") or 0.0
    when = f" in {seconds(delay)}" if delay > 0 else " at once"
    if action == "pause":
        when = f" until {_UNTIL.get(str(e.get('until')), 'it can go on')}"
    elif action in ("give_up", "requeue"):
        when = ""
    return f"{_ACTIONS.get(action, action)}{when}: {short(str(e.get('reason', '')))}"


_ACTIONS = {
    "give_up": "giving up",
    "restart": "restarting",
    "roll_back": "restarting from an older checkpoint",
    "smaller": "restarting without that rank's GPU",
    "pause": "pausing",
    "requeue": "ending, to be started again elsewhere",
}


def _branched(e: Event) -> str:
    why = e.get("reason")
    return f"going back to step {e.get('step', '?')}" + (f": {why}" if why else ", as asked")


def _excluded(e: Event) -> str:
    gpu = e.get("gpu")
    whose = "" if gpu is None else f"'s GPU {gpu}"
    return f"going on without rank {e.get('rank', '?')}{whose} on {e.get('host', '?')}"


def _pause_ended(e: Event) -> str:
    after = f"after {seconds(e.get('seconds'))}"
    problem = e.get("problem")
    return f"no longer waiting, {after}: {problem}" if problem else f"going on {after}"


def _completed(e: Event) -> str:
    # A script without a session never says its step.
    at = "" if e.get("step") == -1 else f" at step {e.get('step', '?')}"
    return f"run completed{at} in {seconds(e.get('seconds'))}"


def _resharded(e: Event) -> str:
    text = f"{e.get('from', '?')} ranks in the checkpoint, {e.get('to', '?')} now: resharded"
    batch = e.get("global_batch")
    return f"{text}; a step takes {batch} samples from now on" if batch else text


def _partly(e: Event) -> str:
    lists = {key: value for key, value in e.items() if isinstance(value, list) and value}
    told = "; ".join(f"{key} {_list(value)}" for key, value in lists.items())
    return short(f"checkpoint step {e.get('step', '?')} restored in part: {told}")


def _straggler(e: Event) -> str:
    ratio = e.get("ratio")
    much = f" {ratio:.1f} times" if isinstance(ratio, int | float) else ""
    return f"rank {e.get('rank', '?')} is{much} slower than its peers"


def _flushed(e: Event) -> str:
    behind = e.get("behind") or {}
    return f"not everything is copied to {_list(behind)}" if behind else ""


def _list(items: Any) -> str:
    return ", ".join(map(str, items or ()))


def _interrupted(e: Event) -> str:
    return f"interrupted: {e.get('reason', 'asked to stop')}; continue with: autoglm resume"


_SAY: dict[str, Callable[[Event], str]] = {
    "run_started": _run_started,
    "supervisor_started": _supervisor_started,
    "slurm": lambda e: f"Slurm {slurm_job(e)}",
    "time_limit": _time_limit,
    "zygote_ready": _zygote_ready,
    "zygote_lost": lambda e: f"the warm launcher is gone: {e.get('reason', '?')}",
    "cold_start": lambda e: f"starting cold: {e.get('reason', '?')}",
    "gate": _gate,
    "quarantined": lambda e: f"checkpoint step {e.get('step', '?')} moved to quarantine",
    "attempt_started": _attempt_started,
    "restored": _restored,
    "first_step": _first_step,
    "committed": lambda e: f"checkpoint step {e.get('step', '?')} committed",
    "save_requested": _save_requested,
    "save_failed": _save_failed,
    "save_cut_off": _save_cut_off,
    "save_skipped": lambda e: f"no save after step {e.get('step', '?')}: {e.get('reason', '?')}",
    "saver_lost": lambda e: f"rank {e.get('rank', '?')}'s saver died and was replaced",
    "branched": _branched,
    "excluded": _excluded,
    "paused": lambda e: f"waiting: {e.get('reason', '?')}",
    "pause_ended": _pause_ended,
    "waiting": lambda e: f"waiting {seconds(e.get('seconds'))} more: {e.get('reason', '?')}",
    "brought_back": lambda e: f"{e.get('id', '?')} brought back from a replica",
    "resharded": _resharded,
    "partly_restored": _partly,
    "replica_behind": lambda e: (
        f"replica {e.get('replica', '?')} is behind: {short(str(e.get('reason', '?')))}"
    ),
    "replica_caught_up": lambda e: f"replica {e.get('replica', '?')} has caught up",
    "replicas_flushed": _flushed,
    "repaired": lambda e: f"{e.get('id', '?')} repaired from a replica: {_list(e.get('files'))}",
    "repair_failed": lambda e: (
        f"{e.get('id', '?')} not repaired: {short(str(e.get('reason', '?')))}"
    ),
    "straggler": _straggler,
    "spare_failed": lambda e: f"a warm spare died: {short(str(e.get('reason', '?')))}",
    "notify_failed": lambda e: (
        f"nobody could be told through {e.get('target', '?')}: {e.get('reason', '?')}"
    ),
    "interval": lambda e: f"saving {e.get('reason', '?')}",
    "refused": _refused,
    "stopped": _stopped,
    "drill": _drill,
    "failure": _failure,
    "decision": _decision,
    "stop_requested": lambda e: f"stop requested by {e.get('by', '?')}",
    "run_completed": _completed,
    "warning": lambda e: short(str(e.get("text", ""))),
    "run_interrupted": _interrupted,
    "run_failed": lambda e: f"run failed: {short(str(e.get('reason', '?')))}",
}
