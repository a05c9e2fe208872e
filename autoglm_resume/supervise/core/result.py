"""Whether a script that came to its good end leaves the result that it was to have. Pure."""

from __future__ import annotations

from pathlib import PurePath

from autoglm_resume.errors import UsageError
from autoglm_resume.failures import Kind
from autoglm_resume.supervise.core import patterns
from autoglm_resume.supervise.core.failure import Failure


def missing(
    began: int, step: int, kept: int, asked: int | None = None, unsaved: str = ""
) -> Failure | None:
    """Why the run is not complete though every rank exited with 0; None if it is.

    The ranks `began` after so many steps and have completed `step` (-1 without a session); the
    newest checkpoint is of step `kept` (0 without one). `asked` is how many the script wanted, if
    it said so; `unsaved` is why its last save failed, if it did.
    """
    if kept < step:
        lost = f"step {step} is" if step == kept + 1 else f"steps {kept + 1} to {step} are"
        summary = f"the script ended well, and {lost} in no checkpoint"
        row = patterns.explain("SaveFailed", unsaved, "", early=False) if unsaved else None
        return Failure(
            row.kind if row else Kind.NO_RESULT,
            None,
            f"{summary}: {unsaved}" if unsaved else f"{summary}: {NO_SAVE}",
            step,
            place="the last save",
        )
    if asked is not None and asked < began and step == began:
        summary = (
            f"the script asks for {asked} steps, and the checkpoint that it began with is of step "
            f"{began}: `autoglm run --fresh` starts over, `autoglm resume --from STEP` goes back"
        )
        return Failure(Kind.NO_RESULT, None, summary, step, place="the number of steps")
    return None


def require_more(failure: Failure | None, finished: int, run: PurePath, name: str) -> None:
    """Of a run that was finished at that step, and has come no further though it was to go on.

    Raises UsageError unless there is another `failure` than that the script has no more steps.
    """
    if failure is None or failure.kind is Kind.NO_RESULT:
        raise UsageError(
            f"{run}: this run is finished at step {finished}, and the script asks for no more"
            " steps, as it is told now",
            hint="ask for more (they count from the start of the run); or give the other command a"
            f" run of its own: --set name={name}-2; or autoglm run --fresh begins a new one here"
            " and keeps this one's files",
        )


NO_SAVE = "session.save() at its end, called in every rank, keeps them"
