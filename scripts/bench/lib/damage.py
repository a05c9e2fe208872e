"""What disks, copies and people do to files: every kind of damage, at every region of a file."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("flip", "zero", "truncate", "extend", "empty", "delete", "swap")
BLOCK = 4096


@dataclass(frozen=True)
class Damage:
    """One damage to `file`: at byte `start`, or with the file `other`. Both are relative paths."""

    kind: str
    file: str
    start: int = 0
    other: str = ""

    def __str__(self) -> str:
        place = f" with {self.other}" if self.other else f" at byte {self.start}"
        return f"{self.kind} {self.file}{place}"

    @property
    def touched(self) -> tuple[str, ...]:
        """The files that are damaged."""
        return (self.file, self.other) if self.other else (self.file,)

    def apply(self, root: Path) -> bool:
        """Do it to the files under `root`, whose old content may still be linked from elsewhere.

        Returns whether a byte was changed.
        """
        path, old = root / self.file, (root / self.file).read_bytes()
        if self.kind == "swap":
            twin = root / self.other
            changed = twin.read_bytes() != old
            path.rename(path.with_name("swapping"))
            twin.rename(path)
            path.with_name("swapping").rename(twin)
            return changed
        path.unlink()
        if self.kind == "delete":
            return True
        new = self._changed(old)
        path.write_bytes(new)
        return new != old

    def _changed(self, old: bytes) -> bytes:
        start = self.start
        if self.kind == "flip":
            bit = 1 << (start * 5 + 3) % 8
            return old[:start] + bytes([old[start] ^ bit]) + old[start + 1 :]
        if self.kind == "zero":
            return old[:start] + bytes(min(BLOCK, len(old) - start)) + old[start + BLOCK :]
        if self.kind == "extend":
            return old + bytes(BLOCK)
        return old[: start if self.kind == "truncate" else 0]


def files_under(root: Path) -> list[str]:
    """Relative paths of all files that have content."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size)
    return [str(path.relative_to(root)) for path in paths]


def damages(
    root: Path, regions: int, seed: int, files: Iterable[str] | None = None
) -> Iterator[Damage]:
    """All kinds, in `regions` equal regions of every file (and its ends), and every swap that fits.

    A region is struck at a random place; a file is swapped with those of the same name in other
    directories and with those of the same suffix in its own.
    """
    choose = random.Random(seed)
    every = files_under(root)
    struck = every if files is None else list(files)
    for file in struck:
        size = (root / file).stat().st_size
        edges = [size * n // regions for n in range(regions + 1)]
        inner = {choose.randrange(a, b) for a, b in itertools.pairwise(edges) if a < b}
        for start in sorted(inner | {0, size - 1}):
            yield Damage("flip", file, start)
        for start in sorted(inner):
            yield Damage("zero", file, start)
            yield Damage("truncate", file, start)
        yield Damage("truncate", file, size - 1)
        yield from (Damage(kind, file) for kind in ("extend", "empty", "delete"))
        for other in every:
            if (other not in struck or file < other) and _alike(Path(file), Path(other)):
                yield Damage("swap", file, other=other)


def _alike(one: Path, other: Path) -> bool:
    if one.parent == other.parent:
        return one.suffix == other.suffix
    return one.name == other.name


def view(pristine: Path, place: Path) -> None:
    """Make `place` look like `pristine`, of symbolic links: damage there leaves `pristine` alone.

    Copies and hard links would change what stat says of the files, and with it what a gate does.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in pristine.rglob("*"):
        target = place / path.relative_to(pristine)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)


def by_kind(found: Iterable[tuple[Damage, str]]) -> dict[str, Counter[str]]:
    """How often each outcome came of each kind of damage."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for damage, outcome in found:
        counts[damage.kind][outcome] += 1
    return counts
