"""A job while it is being read: its data, where each piece stands, what is wrong so far."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from autoglm_resume import files
from autoglm_resume.errors import UsageError

Keys = tuple[str | int, ...]

LARGEST_FILE: Final = 1 << 20
MOST_VALUES: Final = 10_000
DEEPEST: Final = 20

HINTS: Final = {
    "unknown key": "`autoglm schema` prints every key.",
    "is not set": "a default for a variable: ${NAME:-default}; a $ that begins none: $$",
}
ASIDE: Final = "x-"
"""So begin keys beside those of a job: a place for what aliases stand for."""
_MERGE: Final = "tag:yaml.org,2002:merge"

# Where a number stands for its text: `007` and `1.50` are passed on as they were written.
_TEXTS: Final = ("name", "args", "env")


@dataclass(frozen=True)
class Location:
    """Where a key and its value stand, and how that place sorts among the others."""

    order: tuple[int, ...]
    key: str
    value: str


@dataclass
class Draft:
    """A job that is being read: its data, where each piece stands, and what is wrong so far."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, Location] = field(default_factory=dict)
    problems: dict[str, tuple[int, ...]] = field(default_factory=dict)  # line → order
    overrides: int = 0

    def refusal(self) -> UsageError:
        lines = sorted(self.problems, key=lambda line: self.problems[line])
        hint = next((HINTS[what] for what in HINTS if any(what in line for line in lines)), "")
        return UsageError("\n".join(lines), hint=hint)

    def refuse(self, keys: Keys, what: str, *, at_key: bool = False) -> None:
        """Note that `what` is wrong with the value at `keys`, or with its key."""
        known = next(keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in self.places)
        place = self.places[known]
        where = place.key if at_key else place.value
        line = ": ".join(filter(None, (where, ".".join(map(str, keys)), what)))
        # What the file holds must not break the line it is told in.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        self.problems[line] = place.order

    def read_file(self, path: Path) -> None:
        """Take the job from the file, or raise UsageError if it is no YAML mapping at all."""
        node = _compose(_read(path, self.source), self.source)
        start = f"{self.source}:1:1"
        self.places[()] = Location((1, 1), start, start)
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{start}: expected a mapping of keys such as `script: train.py`")
        self.data = _Conversion(self, self.source).mapping(node, ())

    def take_script(self, path: Path) -> None:
        """Make the job that runs this script."""
        self.data = {"script": str(path.absolute()).replace("$", "$$")}
        self.places[()] = Location((1, 1), self.source, self.source)

    def override(self, text: str, label: str = "") -> None:
        """Apply `KEY.KEY=VALUE`, the value read as YAML; a number is a place in a list, and the one
        behind its last appends. `label` says whose it is in refusals.
        """
        label = label or f"--set {text}"
        self.overrides += 1
        order = (sys.maxsize, self.overrides)
        path, equals, value = text.partition("=")
        keys = tuple(path.strip().split("."))
        if not equals or not all(keys):
            self.problems[f"{label}: expected KEY=VALUE, such as checkpoint.keep=5"] = order
            return
        try:
            node = _compose(value, label)
        except UsageError as error:
            self.problems[error.message] = order
            return
        at = self._holder(keys, Location(order, label, label))
        if at is not None:
            holder, place = at
            found = _Conversion(self, None).value(node, place) if node else None
            if isinstance(holder, list) and place[-1] == len(holder):
                holder.append(found)
            else:
                holder[place[-1]] = found

    def append_arguments(self, arguments: Sequence[str]) -> None:
        """Give the script these, behind its `args`."""
        given = self.data.get("args")
        if given is None:
            given = self.data["args"] = []
        for argument in arguments if isinstance(given, list) else ():
            where = f"-- {argument}"
            self.places["args", len(given)] = Location((sys.maxsize, sys.maxsize), where, where)
            given.append(argument)

    def _holder(self, words: Sequence[str], location: Location) -> tuple[Any, Keys] | None:
        """What the value at these keys is to be put into, made if need be, and where it is then;
        a number is a place in a list. None where there is no such place, which is noted.
        """
        inner: Any = self.data
        keys: Keys = ()
        for word in words:
            if keys and not isinstance(inner[keys[-1]], dict | list):
                inner[keys[-1]] = {}
                self.places[keys] = location
            inner = inner[keys[-1]] if keys else inner
            if not isinstance(inner, list):
                inner.setdefault(word, None)
                keys = (*keys, word)
                continue
            last = len(words) == len(keys) + 1
            if not (word.isdecimal() and int(word) < len(inner) + last):
                counted = f"0 to {len(inner) - 1}" if inner else "none"
                self.problems[
                    f"{location.key}: {'.'.join(map(str, keys))} is a list: expected the number of "
                    f"one of its entries ({counted}), found {word!r}"
                ] = location.order
                return None
            keys = (*keys, int(word))
        for place in [place for place in self.places if place[: len(keys)] == keys]:
            del self.places[place]
        self.places[keys] = location
        return inner, keys


def similar_file(path: Path) -> str:
    """`, did you mean 'train.py'?` if a file beside `path` is called nearly so."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _read(path: Path, source: str) -> str:
    try:
        if path.is_dir():
            raise UsageError(f"{source}: expected a job file, found a directory")
        data = files.read(path, LARGEST_FILE)
    except FileNotFoundError:
        raise UsageError(f"{source}: no such file: {path.absolute()}{similar_file(path)}") from None
    except files.UnfitFile as error:
        raise UsageError(f"{source}: no job file: {error.strerror}") from None
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise UsageError(
            f"{source}:{line}:{column}: not UTF-8: found byte 0x{data[error.start]:02x}"
        ) from None
    if not text.strip():
        raise UsageError(
            f"{source}:1:1: empty", hint="The shortest job file is `script: train.py`."
        )
    return text


def _compose(text: str, source: str) -> yaml.Node | None:
    """The YAML node tree of `text`. Raises UsageError naming the line where it is no YAML."""
    at_line = not source.startswith("--")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in what:
            what = "found a tab, YAML indents with spaces"
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark and at_line else source
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        what = f"found the character #x{error.character:04x}, which YAML does not allow"
        where = f"{source}:{line}:{column}" if at_line else source
    except RecursionError:
        where, what = source, "nested too deeply"
    raise UsageError(f"{where}: not valid YAML: {what}")


@dataclass
class _Conversion:
    """Turns YAML nodes into plain values, noting where each stands; tags run no code.

    Aliases are followed, so a small file can stand for a huge tree: values are counted as they are
    visited, and the depth is bounded.
    """

    draft: Draft
    source: str | None  # None: every place is the override that is being applied
    visited: int = 0

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        self.visited += 1
        if self.visited > MOST_VALUES or len(keys) > DEEPEST:
            # Too large to look further for more problems.
            where = self._mark(node) if self.source else next(reversed(self.draft.places.values()))
            raise UsageError(f"{where.value}: too many values, or nested too deeply, for a job")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._entry(each, each, (*keys, n)) for n, each in enumerate(node.value)]
        return self._scalar(node, keys)

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        result: dict[str, Any] = {}
        given: set[str] = set()
        for key, value in node.value:
            if key.tag == _MERGE:
                result = {**self._merged(value, keys), **result}
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                self.draft.refuse(keys, "expected every key to be a word")
                continue
            inner = (*keys, key.value)
            if key.value in given:
                first = self.draft.places[inner].key
                self._remember(key, value, inner)
                self.draft.refuse(inner, f"given twice, first at {first}", at_key=True)
            given.add(key.value)
            result[key.value] = self._entry(key, value, inner)
        return {key: value for key, value in result.items() if keys or not key.startswith(ASIDE)}

    def _merged(self, node: yaml.Node, keys: Keys) -> dict[str, Any]:
        """What stands for `<<`: a mapping, or several, of which the first counts most."""
        found: dict[str, Any] = {}
        for each in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(each, keys) if isinstance(each, yaml.MappingNode) else None
            if value is None:
                self.draft.refuse(keys, "<<: expected an alias of a mapping, or a list of them")
            found.update(value or {})
        return found

    def _entry(self, key: yaml.Node, value: yaml.Node, keys: Keys) -> Any:
        self._remember(key, value, keys)
        return self.value(value, keys)

    def _remember(self, key: yaml.Node, value: yaml.Node, keys: Keys) -> None:
        if self.source:
            at_key, at_value = self._mark(key), self._mark(value)
            self.draft.places[keys] = Location(at_key.order, at_key.key, at_value.value)

    def _mark(self, node: yaml.Node) -> Location:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        where = f"{self.source}:{line}:{column}"
        return Location((line, column), where, where)

    def _scalar(self, node: yaml.Node, keys: Keys) -> Any:
        tag = node.tag.rpartition(":")[2]
        is_number = tag in ("int", "float")
        if is_number and (keys[0] in _TEXTS or ":" in node.value):
            return node.value  # as it was written: `007` and `1.50` are texts, `12:30` is no number
        if tag in ("null", "bool", "int", "float"):
            constructor = yaml.constructor.SafeConstructor()
            try:
                return constructor.construct_object(node)
            except (
                ValueError,
                KeyError,
            ):  # an explicit tag on text that does not fit it
                return node.value
        if tag not in ("str", "timestamp", "value", "merge"):
            self.draft.refuse(keys, f"the YAML tag {node.tag!r} has no meaning in a job file")
        return node.value
