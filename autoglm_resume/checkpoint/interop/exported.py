"""What all kinds of export have in common: the document, kept as text under one key."""

from __future__ import annotations

import json
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import Json, compact
from autoglm_resume.checkpoint.interop.bundle import Bundle
from autoglm_resume.errors import CorruptCheckpoint, UsageError

OURS = "autoglm"
"""Key, in metadata and states, of what only an import needs."""
EXPECTED = "what autoglm export writes (safetensors, torch.save or DCP)"
AGAIN = (
    "export it again; what others have made, load in your script, track() what it holds, and save"
)


def begin_of(source: Path) -> bytes:
    """The first bytes of a file; none of a directory. Raises OSError."""
    if source.is_dir():
        return b""
    with files.reading(source) as file:
        return file.read(16)


def text_of(document: Json) -> str:
    """Its spelling in an export."""
    return compact(document).decode()


def parsed(text: object, source: Path) -> dict[str, Json]:
    """The document again. Raises CorruptCheckpoint, and UsageError where there is none."""
    if not isinstance(text, str):
        raise not_ours(source)
    try:
        document: dict[str, Json] = json.loads(text)
        if Bundle(document, {}).raw >= 0:
            return document
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise CorruptCheckpoint(f"{source}: its document is not as written")


def damaged(source: Path, found: str, error: BaseException) -> CorruptCheckpoint:
    """That `source` is not an export any more."""
    # What the libraries say goes on for pages.
    reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
    return CorruptCheckpoint(
        f"{source}: expected {EXPECTED}, found {found} ({reason or type(error).__name__})",
        hint=AGAIN,
    )


def not_ours(source: Path) -> UsageError:
    """That `source` never was an export."""
    return UsageError(
        f"{source}: not made by autoglm export",
        hint="load it in your script, track() what it holds, and save",
    )
