"""What a zygote has imported ahead of a script, kept from it until it is what the script imports.

A module depends on more than its name: on the variables that it reads while it is imported, and
on the path where it is found. A script may set both before its first import, and has a directory of
its own in front of the path. So a rank that is forked finds what was imported ahead neither in
`sys.modules` nor anywhere else, until it imports it: then either nothing that matters has changed
since, or the rank starts over in a process that has imported nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TypeAlias

from autoglm_resume.worker import environment_reads, imports

StartOver: TypeAlias = Callable[[str, str], None]

OURS = "autoglm_resume"


@dataclass(frozen=True)
class Entry:
    """One module that was asked for, and all that came with it."""

    name: str
    modules: dict[str, ModuleType]
    read: frozenset[str]
    """Environment variables that were read meanwhile."""
    native: bool
    """Whether libraries in C came with it, of which nobody sees what they read."""


_entries: list[Entry] = []
under_way = False
"""Whether the script has begun a session, so that it cannot begin again by itself."""


@contextmanager
def importing(name: str) -> Iterator[None]:
    """What the block imports, it imports ahead, for `name`."""
    known = set(sys.modules)
    environment_reads.watch()
    try:
        yield
    finally:
        environment_reads.stop()
        new = {n: m for n, m in sys.modules.items() if n not in known and _is_kept(n, m)}
        native = any(
            str(getattr(module, "__file__", "")).endswith(".so") for module in new.values()
        )
        _entries.append(Entry(name, new, environment_reads.read(), native))


def _is_kept(name: str, module: object) -> bool:
    # What belongs to Python is the same everywhere, and this package is there for the rank.
    if not isinstance(module, ModuleType) or name == "__mp_main__":
        return False
    return name.partition(".")[0] != OURS and not imports.is_of_python(module)


def keep(start_over: StartOver) -> None:
    """Keep from the script what was imported ahead; `start_over(module, reason)` does not return,
    and is called where that is not what the script imports.
    """
    if _entries:
        sys.meta_path.insert(0, _Kept(_entries, start_over))
        _entries.clear()


class _Kept(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what was imported ahead, and gives it back, with all that was imported before it: that
    is where it has its own imports from.
    """

    def __init__(self, entries: Sequence[Entry], start_over: StartOver) -> None:
        self._entries = list(entries)
        self._start_over = start_over
        self._modules = {name: m for entry in entries for name, m in entry.modules.items()}
        self._specs = {name: module.__spec__ for name, module in self._modules.items()}
        for name in self._modules:
            sys.modules.pop(name, None)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for entry in self._up_to(fullname):
            if reason := self._differs(entry):
                self._start_over(entry.name, reason)
        return spec_from_loader(fullname, self) if fullname in self._modules else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        name = module.__spec__.name
        module.__spec__ = self._specs[name]
        back = self._up_to(name)
        self._entries = self._entries[len(back) :]
        for each, found in ((n, m) for entry in back for n, m in entry.modules.items()):
            sys.modules.setdefault(each, found)
            self._modules.pop(each, None)
        if not self._entries:
            sys.meta_path.remove(self)

    def _up_to(self, name: str) -> list[Entry]:
        """The entries up to that in which `name` was imported; none if that is nowhere."""
        for at, entry in enumerate(self._entries):
            if name in entry.modules:
                return self._entries[: at + 1]
        return []

    def _differs(self, entry: Entry) -> str:
        """Why the script would have imported something else; empty if it would not."""
        changed = environment_reads.changed()
        read = changed & entry.read
        if entry.native:
            read |= environment_reads.of_libraries(changed)
        if read:
            return f"the script sets {', '.join(sorted(read))} before it imports {entry.name}"
        for name in {name.partition(".")[0] for name in entry.modules} & entry.modules.keys():
            ahead = self._specs[name]
            if ahead is None or not ahead.has_location:
                continue  # made by another module
            found = self._found_now(name)
            if found is None or found.origin != ahead.origin:
                where = found.origin if found else "nowhere"
                return f"the script finds {name} at {where}, and not at {ahead.origin}"
        return ""

    def _found_now(self, name: str) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (found := finder.find_spec(name, None)):
                return found
        return None
