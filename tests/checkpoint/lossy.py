"""A disk that forgets: what a process did to files, and every tree that a power failure leaves.

`record` runs real code in a fork and writes down each change of a directory, each write and each
flush, in the order in which they happened. `Crashed` is the moment before one of them, and `tree`
one of the trees that may be found when the machine is back. What was flushed is there. Of the rest:

- every change of a directory is there or not, whatever became of those before and after it (a
  rename is there as a whole or not at all: ext4, XFS, Btrfs and ZFS promise that, and no program
  that renames could do without);
- a file has what was flushed last, all of it, or anything between: cut short, or with the right
  size and zeros in it.

That is less than any journaling file system promises, and more than nothing: flushed stays flushed.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 4096


@dataclass(frozen=True)
class Op:
    """One operation on paths relative to the root; `token` joins the two ends of a flush."""

    kind: str
    path: str = ""
    to: str = ""
    data: bytes = b""
    token: int = 0


class Recorder:
    """Writes down what this process does to the files under `root`, from any thread.

    It cannot be removed again, so it belongs into a fork. Raises AssertionError inside the code
    that modifies an existing file.
    """

    def __init__(self, root: Path) -> None:
        self.ops: list[Op] = []
        self._root = root.resolve()
        self._lock = threading.RLock()
        self._written: dict[str, tuple[int, int]] = {}
        self._flush = {"fsync": os.fsync, "fdatasync": os.fdatasync}
        os.fsync = lambda fd: self._flushing("fsync", fd)  # type: ignore[assignment]
        os.fdatasync = lambda fd: self._flushing("fdatasync", fd)
        self._write = os.write
        os.write = self._writing  # type: ignore[assignment]
        sys.addaudithook(self._event)

    def mark(self, text: str) -> None:
        """Something that the story has to say."""
        with self._lock:
            self._settle()
            self.ops.append(Op("mark", text))

    def _inside(self, path: Any, dir_fd: int = -1) -> str | None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        base = Path.cwd() if dir_fd < 0 else Path(f"/proc/self/fd/{dir_fd}").readlink()
        full = base / os.fsdecode(path)
        full = full.parent.resolve() / full.name
        if not full.is_relative_to(self._root):
            return None
        return "" if full == self._root else str(full.relative_to(self._root))

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter right before it does this."""
        if event == "open":
            path, _, flags = arguments
            inside = self._inside(path) if flags & (os.O_WRONLY | os.O_RDWR) else None
            if inside is not None:
                assert flags & os.O_CREAT, f"{inside} is opened for writing"
                assert not (self._root / inside).exists(), f"{inside} is overwritten"
                self._add(Op("create", inside))
                self._written[inside] = (0, 0)
        elif event in ("os.remove", "os.rmdir"):
            path, dir_fd = arguments
            if inside := self._inside(path, dir_fd):
                self._add(Op(event.removeprefix("os."), inside))
        elif event == "os.mkdir":
            path, _, dir_fd = arguments
            if inside := self._inside(path, dir_fd):
                self._add(Op("mkdir", inside))
        elif event in ("os.rename", "os.link"):
            source, target, source_fd, target_fd = arguments
            inside, to = self._inside(source, source_fd), self._inside(target, target_fd)
            if inside and to:
                self._add(Op(event.removeprefix("os."), inside, to))
        elif event in ("os.truncate", "os.symlink"):
            assert self._inside(arguments[0]) is None, f"{event} is not expected"

    def _add(self, op: Op) -> None:
        with self._lock:
            self._settle()
            self.ops.append(op)
            if op.kind == "rename" and op.path in self._written:
                self._written[op.to] = self._written.pop(op.path)

    def _settle(self) -> None:
        """Note what was written since the last operation."""
        for path, known in list(self._written.items()):
            full = self._root / path
            try:
                found = full.stat()
                if (found.st_size, found.st_mtime_ns) == known:
                    continue
                data = full.read_bytes()
            except FileNotFoundError:
                continue
            self._written[path] = (found.st_size, found.st_mtime_ns)
            self.ops.append(Op("write", path, data=data))

    def _writing(self, fd: int, data: bytes) -> int:
        """Between two writes in a row there is a moment, too."""
        with self._lock:
            if self._inside(fd) is not None:
                self._settle()
        return self._write(fd, data)

    def _flushing(self, how: str, fd: int) -> None:
        inside = self._inside(fd)
        if inside is None:
            return
        with self._lock:
            self._settle()
            token = len(self.ops)
            self.ops.append(Op("flush", inside, token=token))
        self._flush[how](fd)
        with self._lock:
            self.ops.append(Op("flushed", token=token))


def record(root: Path, work: Callable[[Recorder], object]) -> list[Op]:
    """What `work`, done in a fork, does to the files under `root`.

    Raises RuntimeError if it fails.
    """
    result = root.with_name(f"{root.name}.trace")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            recorder = Recorder(root)
            work(recorder)
            recorder.mark("end")
            result.write_bytes(pickle.dumps(recorder.ops))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the story failed, see standard error")
    ops: list[Op] = pickle.loads(result.read_bytes())
    return ops


Tree = Mapping[str, "bytes | None"]
"""Content of every file by its path, None for a directory."""


@dataclass
class _Change:
    """Name `name` of a directory becomes `node`, or nothing. Those of a `group` happen together."""

    group: int
    directory: int
    name: str
    node: int | None
    durable: bool = False


@dataclass
class Crashed:
    """The machine stops right before operation `at`; `tree` says what it may come back with."""

    at: int
    marks: list[str] = field(default_factory=list)
    """What the story said so far, and `moved PATH` for what was renamed or removed since."""

    def __post_init__(self) -> None:
        self._changes: list[_Change] = []
        self._names: dict[int, dict[str, int]] = {0: {}}
        """Directories as the running process sees them."""
        self._content: dict[int, bytes] = {}
        self._kept: dict[int, bytes] = {}
        self._flushes: dict[int, tuple[int, int, bytes]] = {}
        self._next = 1

    @classmethod
    def before(cls, trace: Sequence[Op], at: int, start: Tree) -> Crashed:
        """The moment before `trace[at]`, where all of `start` was durable at the beginning."""
        found = cls(at)
        for path, data in start.items():
            found._do(Op("mkdir" if data is None else "create", path), -1)
            if data is not None:
                node = found._node(path)
                assert node is not None
                found._content[node] = found._kept[node] = data
        for change in found._changes:
            change.durable = True
        for index, op in enumerate(trace[:at]):
            found._do(op, index)
        return found

    @property
    def pending(self) -> list[int]:
        """Groups of changes that may be there or not, in the order in which they were made."""
        return sorted({change.group for change in self._changes if not change.durable})

    def unflushed(self, survivors: Collection[int]) -> dict[str, int]:
        """Files whose content is not certain, by path, with the most bytes they may have."""
        return {
            path: len(self._content[node])
            for path, node in self._walk(survivors)
            if node in self._content and self._content[node] != self._kept[node]
        }

    def tree(
        self, survivors: Collection[int], fates: Mapping[str, Callable[[bytes, bytes], bytes]]
    ) -> Tree:
        """With these of the pending groups, and of uncertain files what their fate says."""
        found: dict[str, bytes | None] = {}
        for path, node in self._walk(survivors):
            if node not in self._content:
                found[path] = None
                continue
            kept, latest = self._kept[node], self._content[node]
            found[path] = latest if kept == latest else fates.get(path, lost)(kept, latest)
        return found

    def _walk(self, survivors: Collection[int]) -> Iterator[tuple[str, int]]:
        names: dict[int, dict[str, int]] = {}
        for change in self._changes:
            if change.durable or change.group in survivors:
                entries = names.setdefault(change.directory, {})
                if change.node is None:
                    entries.pop(change.name, None)
                else:
                    entries[change.name] = change.node
        queue = [("", 0)]
        while queue:
            above, directory = queue.pop()
            for name, node in names.get(directory, {}).items():
                yield above + name, node
                queue.append((f"{above}{name}/", node))

    # The operations, as the running process sees them: what fails there changes nothing here

    def _do(self, op: Op, index: int) -> None:
        if op.kind == "mark":
            self.marks.append(op.path)
        elif op.kind == "flushed":
            self._flushed(*self._flushes.pop(op.token))
        elif op.kind in ("create", "mkdir"):
            if self._node(op.path) is None:
                node, self._next = self._next, self._next + 1
                if op.kind == "mkdir":
                    self._names[node] = {}
                else:
                    self._content[node] = self._kept[node] = b""
                self._change(index, op.path, node)
        elif (node := self._node(op.path)) is not None:
            self._change_existing(op, index, node)

    def _change_existing(self, op: Op, index: int, node: int) -> None:
        if op.kind == "write":
            self._content[node] = op.data
        elif op.kind == "flush":
            self._flushes[op.token] = (node, len(self._changes), self._content.get(node, b""))
        elif op.kind == "link":
            if self._node(op.to) is None:
                self._change(index, op.to, node)
        elif op.kind == "rename":
            self._change(index, op.path, None)
            self._change(index, op.to, node)
            self.marks.append(f"moved {op.path}")
        elif not self._names.get(node):  # a directory is only removed when it is empty
            self._change(index, op.path, None)
            self.marks.append(f"moved {op.path}")

    def _flushed(self, node: int, changes: int, content: bytes) -> None:
        if node in self._content:
            self._kept[node] = content
            return
        here = [change for change in self._changes[:changes] if change.directory == node]
        groups = {change.group for change in here}
        for change in self._changes:
            change.durable = change.durable or change.group in groups

    def _change(self, index: int, path: str, node: int | None) -> None:
        above, _, name = path.rpartition("/")
        directory = self._node(above)
        if directory is None:
            return
        self._changes.append(_Change(index, directory, name, node))
        if node is None:
            self._names[directory].pop(name, None)
        else:
            self._names[directory][name] = node

    def _node(self, path: str) -> int | None:
        node: int | None = 0
        for name in path.split("/") if path else ():
            node = self._names.get(node, {}).get(name) if node is not None else None
        return node


def lost(kept: bytes, latest: bytes) -> bytes:
    """Nothing after the last flush."""
    return kept


def whole(kept: bytes, latest: bytes) -> bytes:
    """All of it, by good luck."""
    return latest


def torn(at: int) -> Callable[[bytes, bytes], bytes]:
    """Cut short after `at` bytes, but not before what was flushed."""
    return lambda kept, latest: latest[: max(len(kept), at % (len(latest) + 1))]


def zeroed(at: int) -> Callable[[bytes, bytes], bytes]:
    """The right size, with zeros from the block of byte `at` on."""

    def fate(kept: bytes, latest: bytes) -> bytes:
        start = max(len(kept), at % (len(latest) + 1) // BLOCK * BLOCK)
        return latest[:start] + bytes(len(latest) - start)

    return fate


class Places:
    """Trees made real, in `root`; equal files are linked, so they must not be modified."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pool: dict[bytes, Path] = {}
        self._count = 0

    def make(self, tree: Tree) -> Path:
        """A new directory with this tree."""
        self._count += 1
        place = self._root / f"place-{self._count}"
        place.mkdir()
        for path in sorted(tree):
            data = tree[path]
            if data is None:
                (place / path).mkdir()
            else:
                os.link(self._blob(data), place / path)
        return place

    def _blob(self, data: bytes) -> Path:
        if data not in self._pool:
            path = self._pool[data] = self._root / f"blob-{len(self._pool)}"
            path.write_bytes(data)
        return self._pool[data]
