"""What people are told when the state of a run changes. Pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.say import failed, seconds, sentence, short
from autoglm_resume.observe.pure.segments import step_of

ENDS: dict[type[Event], str] = {
    events.RunCompleted: "completed",
    events.RunInterrupted: "interrupted",
    events.RunFailed: "gave_up",
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
    failure: events.GroupFailed | None = None
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
    match event:
        case events.FirstStep(time=now) if before.failure is not None:
            since = before.failure.time
            after = "" if since is None or now is None else f" after {seconds(max(0, now - since))}"
            return _message("recovered", f"training again{after}", event, before)
        case events.FirstStep() if not before.stepped:
            return _message("started", "training", event, before)
        case events.GroupFailed():
            return _message("failed", failed(event), event, before)
        case events.DecisionMade(action="pause"):
            return _message("paused", sentence(event) or "paused", event, before)
        case events.Straggler():
            return _message("straggler", sentence(event) or "a rank is slow", event, before)
        case events.RunInterrupted():
            what = f"{sentence(event)}; continue with: {_resume(before)}"
            return _message("interrupted", what, event, before)
        case _ if type(event) in ENDS:
            return _message(ENDS[type(event)], sentence(event) or event.event, event, before)
        case _:
            return None


def died(context: Context, now: float) -> Message | None:
    """What to tell when the supervisor is gone; None if the run had ended. `now`: Unix seconds."""
    if context.ended:
        return None
    saved = context.checkpoint
    goes_on = "the beginning" if saved is None else f"step {saved}"
    text = f"its supervisor died; `{_resume(context)}` continues from {goes_on}"
    return _message("died", text, events.Unknown(time=now, said={}), context)


def after(event: Event, before: Context) -> Context:
    """The context for the event that follows."""
    step = step_of(event)
    match event:
        case events.SupervisorStarted():
            return replace(before, stepped=False, ended=False)
        case events.AttemptStarted(attempt=attempt):
            # From the beginning, no step is complete yet; without a session none ever is.
            attempt = before.attempt if attempt is None else attempt
            return replace(before, attempt=attempt, step=step or None)
        case events.FirstStep():
            return replace(before, failure=None, stepped=True, step=step)
        case events.Committed(step=saved):
            return replace(before, checkpoint=saved, step=max(saved, before.step or 0))
        case events.GroupFailed():
            furthest = before.step if step is None else step
            return replace(before, failure=before.failure or event, step=furthest)
        case _ if type(event) in ENDS:
            return replace(before, ended=True)
        case _:
            return before


def _resume(context: Context) -> str:
    return shlex.join(["autoglm", "resume", context.run])


def _message(on: str, what: str, event: Event, context: Context) -> Message:
    step = step_of(event)
    step = context.step if step is None else step
    about = event if isinstance(event, events.GroupFailed) else context.failure
    reason = short(getattr(event, "reason", "") or (about.summary if about else ""))
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
        "attempt": context.attempt if event.attempt is None else event.attempt,
        "step": step,
        "checkpoint_step": context.checkpoint,
        "kind": about.kind if about else None,
        "rank": about.root_rank if about else getattr(event, "rank", None),
        "place": (about.place if about else "") or None,
        "reason": reason or None,
        "code": getattr(event, "code", None),
        "time": event.time,
    }
    return Message(on, body)
