"""Whether a script that came to its good end leaves the result that it was to have. Pure."""

from __future__ import annotations

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


NO_SAVE = "session.save() at its end, called in every rank, keeps them"
