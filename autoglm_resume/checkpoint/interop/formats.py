"""The layouts that are written for other tools, and those that are read, each by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import files
from autoglm_resume.checkpoint.interop import dcp_directory, safetensors_file, torch_file
from autoglm_resume.checkpoint.interop.adopt import SnapshotSource
from autoglm_resume.checkpoint.interop.bundle import Bundle, state_of
from autoglm_resume.checkpoint.interop.exported import AGAIN, EXPECTED, begin_of
from autoglm_resume.errors import UsageError


@dataclass(frozen=True)
class LayoutReader:
    """`recognises` looks at no more than it must, and unpickles nothing."""

    recognises: Callable[[Path], bool]
    open: Callable[[Path], SnapshotSource]
    """Raises UsageError when it is something else after all, and CheckpointError."""


STATE_WRITERS: Mapping[str, Callable[[Path, Any], None]] = {
    "safetensors": safetensors_file.write_state,
    "torch": torch_file.write_state,
    "dcp": dcp_directory.write_state,
}
"""Of one object's state alone, as people hand on a model."""
WRITERS: Mapping[str, Callable[[Path, Bundle], None]] = {
    "safetensors": safetensors_file.write,
    "torch": torch_file.write,
    "dcp": dcp_directory.write,
}
READERS: Mapping[str, LayoutReader] = {
    "safetensors": LayoutReader(safetensors_file.recognises, safetensors_file.read),
    "torch": LayoutReader(torch_file.recognises, torch_file.read),
    "dcp": LayoutReader(dcp_directory.recognises, dcp_directory.read),
}
"""Asked in this order."""


def check(kind: str, out: Path) -> None:
    """Raises UsageError when `write` would."""
    if kind not in WRITERS:
        raise UsageError(f"--to {kind}: expected one of {', '.join(WRITERS)}")
    if out.exists():
        raise UsageError(f"{out}: there already, and never overwritten")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no directory {out.absolute().parent}")
    if kind == "safetensors":
        safetensors_file.installed()


def write(kind: str, out: Path, bundle: Bundle, only: str | None = None) -> None:
    """Make `out`, which must not be there: all, or the state of one object. Raises UsageError and
    OSError.
    """
    check(kind, out)
    if only is None:
        WRITERS[kind](out, bundle)
    else:
        STATE_WRITERS[kind](out, state_of(bundle, only))


def layout_of(source: Path) -> str:
    """Name of the first layout that `source` is in. Raises UsageError, and OSError."""
    if not source.exists():
        raise UsageError(f"{source}: no such file or directory")
    try:
        for name, reader in READERS.items():
            if reader.recognises(source):
                return name
    except files.UnfitFile as error:
        raise UsageError(f"{source}: {error.strerror}") from None
    if source.is_dir():
        raise UsageError(
            f"{source}: expected a file, or a directory that DCP has written; found no .metadata"
        )
    begin = begin_of(source)
    found = f"a file that begins with {begin!r}" if begin else "an empty file"
    raise UsageError(f"{source}: expected {EXPECTED}, found {found}", hint=AGAIN)


def read(source: Path) -> SnapshotSource:
    """What is in `source`, whatever layout it is in. Raises UsageError and CheckpointError."""
    return READERS[layout_of(source)].open(source)
