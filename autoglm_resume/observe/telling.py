"""An explanation on a screen: wrapped and coloured on a terminal, one line per fact elsewhere."""

from __future__ import annotations

import os
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from autoglm_resume.errors import UsageError
from autoglm_resume.observe import status
from autoglm_resume.observe.pure.explain import Explanation, Story, explain
from autoglm_resume.observe.tables import width
from autoglm_resume.output import printable
from autoglm_resume.supervise.base.run_directory import RunDirectory

_BOLD, _DIM, _RED, _GREEN, _RESET = (f"\x1b[{n}m" for n in (1, 2, 31, 32, 0))
_COLORS = {"failed": _RED, "concluded": _BOLD}
_INDENT = " " * 13
"""As wide as the longest of what is told, and a little."""


def of(run: RunDirectory, attempt: int | None = None) -> Explanation:
    """Explain one run, or one attempt of it. Raises UsageError if there is no such attempt."""
    found = status.of(run)
    here = found.holder is not None and bool(found.ranks)
    explained = explain(
        run.events(),
        alive=found.holder is not None,
        now=time.monotonic() if here else None,
        step=found.step,
    )
    if attempt is None:
        return explained
    stories = tuple(story for story in explained.stories if story.attempt == attempt)
    if not stories:
        known = [story.attempt for story in explained.stories]
        there = f"attempts {min(known)} to {max(known)}" if known else "none yet"
        raise UsageError(f"{run.path}: no attempt {attempt}; found {there}")
    return replace(explained, stories=stories)


def show(path: Path, explained: Explanation, stream: TextIO) -> None:
    """On `stream`."""
    columns = width(stream)
    colors = columns is not None and not os.environ.get("NO_COLOR")
    good = explained.summary.state in ("finished", "training", "starting")
    name = explained.summary.name or path.name
    stream.write(_styled(f"{name}: {explained.now}", columns, "", _mood(colors, good)))
    for no in explained.pending:
        text = f"checkpoint step {no.step} rejected: {no.reason}"
        stream.write(_styled(text, columns, "  ", ""))
    for story in explained.stories:
        stream.write("\n" + _styled(_title(story), columns, "", _BOLD if colors else ""))
        for label, text in story.paragraph:
            stream.write(_told(label, text, columns, colors=colors))


def to_json(path: Path, explained: Explanation) -> dict[str, Any]:
    """Every figure; durations in seconds."""
    return {
        "run": str(path),
        "name": explained.summary.name,
        "state": explained.summary.state,
        "now": explained.now,
        "code": explained.summary.code,
        "step": explained.summary.step,
        "pending_rejected": [asdict(no) for no in explained.pending],
        "attempts": [_story_json(story) for story in explained.stories],
    }


def _story_json(story: Story) -> dict[str, Any]:
    found = asdict(story)
    if story.recovery is not None:
        found["recovery"]["phases"] = dict(story.recovery.phases)
    return {**found, "title": story.title, "paragraph": [list(each) for each in story.paragraph]}


def _title(story: Story) -> str:
    if story.began is None:
        return story.title
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(story.began))}  {story.title}"


def _mood(colors: bool, good: bool) -> str:
    return (_BOLD + (_GREEN if good else _RED)) if colors else ""


def _told(label: str, text: str, columns: int | None, *, colors: bool) -> str:
    color = _COLORS.get(label, _DIM) if colors else ""
    body = _wrapped(text, columns, _INDENT)[len(_INDENT) :]
    padded = f"  {label}".ljust(len(_INDENT))
    return f"{color}{padded}{_RESET if color else ''}{body}\n"


def _styled(text: str, columns: int | None, indent: str, color: str) -> str:
    return f"{color}{_wrapped(text, columns, indent)}{_RESET if color else ''}\n"


def _wrapped(text: str, columns: int | None, indent: str) -> str:
    text = printable(text.replace("\n", "; "))
    if columns is None:
        return indent + text
    return textwrap.fill(
        text,
        max(columns, 40),
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_on_hyphens=False,
    )
