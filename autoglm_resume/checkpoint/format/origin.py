"""Which run made a checkpoint, and by which command: a run is its arguments too. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath

from autoglm_resume.checkpoint.format.document import Json, JsonNode

_KEY = re.compile(r"[A-Za-z_+~][\w.@+-]*")
"""Of `key=value`, as Hydra has it."""
_NUMBER = re.compile(r"-?\.?\d")
_WRITTEN = re.compile(r"[+-]?(\d{1,15}\.?\d*|\.\d+)(e[+-]?\d{1,2})?", re.IGNORECASE | re.ASCII)
_PLACES = {
    *("local-rank", "rank", "node-rank", "world-size", "nnodes", "master-addr", "master-port"),
    *("dist-url", "init-method"),
}
"""Options that say where a process runs, and not what it computes."""
_GOING_ON = {"resume", "auto-resume", "continue"}
"""Options that say what every start but the first does anyway, if they name no file."""
_YES = {"", "auto", "true", "1", "yes", "latest", "last"}


@dataclass(frozen=True)
class Origin:
    """Of a checkpoint, or of what is about to go on from one."""

    run: str
    """The same for all checkpoints that go back to one start from step 0."""
    script: str = ""
    """Absolute path; empty where nobody knows, as in a notebook."""
    content: str = ""
    """Digest of the script's text."""
    args: tuple[str, ...] = ()
    """As they may be shown: what is hidden in them is not compared."""

    @classmethod
    def from_node(cls, node: JsonNode) -> Origin:
        """Raises CorruptCheckpoint."""
        return cls(
            node["run"].text(),
            node["script"].text(),
            node["content"].text(),
            tuple(entry.text() for entry in node["args"].items()),
        )

    def to_json(self) -> Json:
        return {**asdict(self), "args": list(self.args)}

    def __str__(self) -> str:
        """“train.py --lr 0.1”."""
        return shlex.join((PurePath(self.script).name, *self.args)) if self.script else "?"


def differences(before: Origin, now: Origin, *, remains: bool = False) -> list[str]:
    """What of the command is another one now, in words; nothing where one of both is not known.

    A script that was moved is the same, and one that was edited, but not both at once. If the
    script of `before` `remains` where it was, that of `now` was not moved: it is a copy, with
    modules and files of its own beside it.
    """
    if not before.script or not now.script:
        return []
    found = []
    if before.script != now.script and (remains or before.content != now.content):
        found.append(f"script: {before.script} then, {now.script} now")
    then, here = _options(before.args), _options(now.args)
    for name in dict.fromkeys((*then, *here)):
        one, other = then.get(name), here.get(name)
        if _meant(one) != _meant(other) and _counts(name, [*(one or ()), *(other or ())]):
            found.append(f"{name}: {_shown(one)} then, {_shown(other)} now")
    return found


def edited(before: Origin, now: Origin) -> bool:
    """Whether the same script has another text."""
    known = before.script and before.content and now.content
    return bool(known) and before.content != now.content


def _is_option(arg: str) -> bool:
    return arg.startswith("-") and len(arg) > 1 and not _NUMBER.match(arg)


def _options(args: Sequence[str]) -> dict[str, list[str]]:
    """Values by option, however they are written and in whatever order; others by position."""
    found: dict[str, list[str]] = {}
    option, position = "", 0
    for arg in args:
        name, equals, value = arg.partition("=")
        if _is_option(arg):
            option = "" if equals else name
            found.setdefault(name, []).append(value)
        elif option:
            found[option][-1] = arg
            option = ""
        elif equals and _KEY.fullmatch(name):
            found.setdefault(name, []).append(value)
        else:
            position += 1
            found[f"argument {position}"] = [arg]
    return found


def _counts(name: str, values: Sequence[str]) -> bool:
    """Whether another value makes it another run."""
    plain = name.lstrip("-").replace("_", "-")
    return plain not in _PLACES and not (plain in _GOING_ON and set(values) <= _YES)


def _meant(values: Sequence[str] | None) -> list[str | float] | None:
    """`0.1` and `.1` are one number."""
    return None if values is None else [float(v) if _WRITTEN.fullmatch(v) else v for v in values]


def _shown(values: Sequence[str] | None) -> str:
    if values is None:
        return "not given"
    return " ".join(value or "given" for value in values)
