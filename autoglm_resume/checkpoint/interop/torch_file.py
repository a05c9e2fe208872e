"""torch: one file for `torch.load`, the states by object, as scripts know them.

NumPy's arrays and scalars, frozen sets and default dicts would keep `torch.load` from loading a
file as it does by default (weights_only). There they are tensors, numbers, sets and dicts;
importing the file again brings back what they were.
"""

from __future__ import annotations

import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.interop.bundle import Bundle, nested
from autoglm_resume.checkpoint.interop.exported import (
    OURS,
    begin_of,
    damaged,
    not_ours,
    parsed,
    text_of,
)


def write(out: Path, bundle: Bundle) -> None:
    """Raises OSError."""
    # Tensors that are in the state twice are in the file once.
    ours = {"document": text_of(bundle.document), "tensors": dict(bundle.tensors)}
    with files.writing(out, replace=False) as file:
        torch.save({**_plain(nested(bundle), {}), OURS: ours}, file)


def write_state(out: Path, state: Any) -> None:
    """One state alone, as `torch.save(model.state_dict(), out)` would. Raises OSError."""
    with files.writing(out, replace=False) as file:
        torch.save(_plain(state, {}), file)


def recognises(source: Path) -> bool:
    """An archive of zip, as torch.save makes."""
    return begin_of(source).startswith(b"PK")


def read(source: Path) -> Bundle:
    """Raises CorruptCheckpoint, and UsageError."""
    try:
        with zipfile.ZipFile(source) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, and torch.save compresses nothing")
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever untrusted bytes can make of it
        raise damaged(source, "an archive that torch.load does not take", error) from error
    ours = found.get(OURS) if isinstance(found, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("tensors"), dict):
        raise not_ours(source)
    document = parsed(ours.get("document"), source)
    return Bundle(document, ours["tensors"])


def _plain(value: Any, made: dict[int, Any]) -> Any:
    """Of types that torch.load takes by default; `made` has what was made of what, by `id`."""
    if id(value) not in made:
        # With the value itself, so that nothing else gets its id.
        made[id(value)] = _of_plain_type(value, made), value
    return made[id(value)][0]


def _of_plain_type(value: Any, made: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is dict or kind is defaultdict:
        return {key: _plain(child, made) for key, child in value.items()}
    if kind is OrderedDict:
        copy = OrderedDict((key, _plain(child, made)) for key, child in value.items())
        if hasattr(value, "_metadata"):
            copy._metadata = _plain(value._metadata, made)  # type: ignore[attr-defined]
        return copy
    if kind in (list, tuple):
        return kind(_plain(child, made) for child in value)
    if kind in (set, frozenset):
        return {_plain(child, made) for child in value}
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray:
        try:
            return torch.from_numpy(value)
        except TypeError:  # of text, of times
            return value.tolist()
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    return value
