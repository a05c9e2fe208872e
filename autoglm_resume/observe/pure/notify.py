"""What people are told when the state of a run changes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autoglm_resume.journal import Event
from autoglm_resume.observe.pure.say import failed, seconds, sentence, short
from autoglm_resume.observe.pure.segments import number, step_of

ENDS = {
    "run_completed": "completed",
    "run_interrupted": "interrupted",
    "run_failed": "gave_up",
}
_STATES = {
    "started": "training",
    "failed": "recovering",
    "recovered": "training",
    "paused": "paused",
    "straggler": "training",
    "completed": "finished",
    "interrupted": "interrupted",
    "gave_up": "failed",
    "died": "dead",
}


@dataclass(frozen=True)
class Context:
    """The run, and what of its past a message depends on."""

    run: str
    """Its directory."""
    name: str
    run_id: str = ""
    host: str = ""
    attempt: int = 0
    step: int | None = None
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    failure: Event | None = None
    """The last one, until the run trains again."""
    stepped: bool = False
    """Whether the present supervisor's ranks have completed a step."""
    ended: bool = False


@dataclass(frozen=True)
class Message:
    """One change of state."""

    on: str
    """Its name in `notify[].on`."""
    body: dict[str, Any]
    """JSON; `text` is all that Slack and its like need."""


def message(event: Event, before: Context) -> Message | None:
    """What to tell of `event`, which follows `before`; None if nothing."""
    match event["event"]:
        case "first_step" if before.failure is not None:
            since = number(before.failure, "time")
            now = number(event, "time")
            after = "" if since is None or now is None else f" after {seconds(max(0, now - since))}"
            return _message("recovered", f"training again{after}", event, before)
        case "first_step" if not before.stepped:
            return _message("started", "training", event, before)
        case "failure":
            return _message("failed", failed(event), event, before)
        case "decision" if event.get("action") == "pause":
            return _message("paused", sentence(event) or "paused", event, before)
        case "straggler":
            return _message("straggler", sentence(event) or "a rank is slow", event, before)
        case name if name in ENDS:
            return _message(ENDS[name], sentence(event) or name, event, before)
        case _:
            return None


def died(context: Context, now: float) -> Message | None:
    """What to tell when the supervisor is gone; None if the run had ended. `now`: Unix seconds."""
    if context.ended:
        return None
    saved = context.checkpoint
    goes_on = "the beginning" if saved is None else f"step {saved}"
    text = f"its supervisor died; `autoglm resume` continues from {goes_on}"
    return _message("died", text, {"event": "died", "time": now}, context)


def after(event: Event, before: Context) -> Context:
    """The context for the event that follows."""
    step = step_of(event)
    match event["event"]:
        case "supervisor_started":
            return replace(before, stepped=False, ended=False)
        case "attempt_started":
            # From the beginning, no step is complete yet; without a session none ever is.
            return replace(before, attempt=_attempt(event, before), step=step or None)
        case "first_step":
            return replace(before, failure=None, stepped=True, step=step)
        case "committed" if step is not None:
            return replace(before, checkpoint=step, step=max(step, before.step or 0))
        case "failure":
            furthest = before.step if step is None else step
            return replace(before, failure=before.failure or event, step=furthest)
        case name if name in ENDS:
            return replace(before, ended=True)
        case _:
            return before


def _message(on: str, what: str, event: Event, context: Context) -> Message:
    step = step_of(event)
    step = context.step if step is None else step
    about = event if event["event"] == "failure" else context.failure or {}
    reason = short(str(event.get("reason") or about.get("summary") or ""))
    where = f" on {context.host}" if context.host else ""
    at = "" if step is None or "at step" in what else f" (step {step})"
    body = {
        "text": f"{context.name}{where}: {what}{at}",
        "event": on,
        "state": _STATES[on],
        "run": context.run,
        "run_id": context.run_id,
        "name": context.name,
        "host": context.host,
        "attempt": _attempt(event, context),
        "step": step,
        "checkpoint_step": context.checkpoint,
        "kind": about.get("kind"),
        "rank": about.get("root_rank") if about else event.get("rank"),
        "place": about.get("place") or None,
        "reason": reason or None,
        "code": event.get("code"),
        "time": event.get("time"),
    }
    return Message(on, body)


def _attempt(event: Event, context: Context) -> int:
    found = number(event, "attempt")
    return context.attempt if found is None else int(found)
