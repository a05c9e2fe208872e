"""safetensors: one file, all tensors by key, the document in its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import compact
from autoglm_resume.checkpoint.interop.bundle import Bundle
from autoglm_resume.checkpoint.interop.exported import OURS, begin_of, damaged, parsed, text_of
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.errors import CorruptCheckpoint, UsageError

LONGEST_HEADER = 100_000_000
"""Bytes; what is longer the library refuses."""


def write(out: Path, bundle: Bundle) -> None:
    """Raises UsageError where safetensors is not installed, and OSError."""
    known = _names()
    tensors = {
        key: tensor if tensor.dtype in known else _flat(tensor)
        for key, tensor in bundle.tensors.items()
    }
    _write(out, tensors, {OURS: text_of(bundle.document)})


def write_state(out: Path, state: Any) -> None:
    """One state alone, its tensors by their names in it. Raises UsageError, and OSError."""
    tensors = dict(_tensors(state, ""))
    known = _names()
    wrong = {
        name or "it": type(value).__name__ if dtype is None else dtype
        for name, value in tensors.items()
        if (dtype := getattr(value, "dtype", None)) not in known
    }
    if wrong:
        name, found = next(iter(wrong.items()))
        raise UsageError(
            f"{out}: expected only tensors that safetensors can hold, found {name}: {found}",
            hint="use --to torch",
        )
    _write(out, tensors, {})


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is in it, by dotted names."""
    if not isinstance(state, dict):
        yield name, state
        return
    for key, value in state.items():
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _write(out: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    names = _names()
    # "format" is what transformers asks for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    # The widest types first, as the library does it: so all are aligned in a file that is mapped.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    end = 0
    for key in order:
        tensor, begin = tensors[key], end
        end += tensor.numel() * tensor.element_size()
        at = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[key] = {"dtype": names[tensor.dtype], **at}
    text = compact(header)
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise UsageError(
            f"{out}: its header would have {len(text)} bytes, safetensors reads {LONGEST_HEADER}",
            hint="use --to torch or --to dcp, or --only for one object of it",
        )
    # Not by the library: it puts a file of its own, which others may not read, in this one's place.
    with files.writing(out, replace=False) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(tree.as_bytes(tensors[key].contiguous()))


def _names() -> dict[torch.dtype, str]:
    """What the library calls the types it knows. Raises UsageError where it is not installed."""
    return {dtype: name for name, dtype in installed()._TYPES.items()}


def recognises(source: Path) -> bool:
    """Eight bytes of length, and a JSON object."""
    return begin_of(source)[8:9] == b"{"


def read(source: Path) -> Bundle:
    """Raises CorruptCheckpoint, and UsageError."""
    library = installed()
    from safetensors import SafetensorError

    try:
        with library.safe_open(source, framework="pt") as found:
            document = parsed((found.metadata() or {}).get(OURS), source)
            tensors = {
                key: _shaped(found.get_tensor(key), dtype, shape)
                for key, (dtype, shape) in document["tensors"].items()
            }
    except SafetensorError as error:
        raise damaged(source, "a safetensors file that cannot be read", error) from error
    return Bundle(document, tensors)


def installed() -> Any:
    """The library. Raises UsageError."""
    try:
        import safetensors.torch as library
    except ImportError as error:
        raise UsageError(
            f"safetensors is not installed ({error})",
            hint="pip install 'autoglm-resume[safetensors]'",
        ) from error
    return library


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor whose dtype is unknown there."""
    return tensor.reshape(-1).view(torch.uint8)


def _shaped(found: torch.Tensor, dtype: str, shape: list[int]) -> torch.Tensor:
    expected = tree.dtype_named(dtype)
    if found.dtype == expected:
        return found
    try:
        return found.view(expected).reshape(shape)
    except RuntimeError as error:
        raise CorruptCheckpoint(f"expected {shape} of {dtype}: {error}") from error
