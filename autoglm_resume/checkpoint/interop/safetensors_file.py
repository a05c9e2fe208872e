"""safetensors: one file, all tensors by key, the document in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.interop.bundle import Bundle
from autoglm_resume.checkpoint.interop.exported import OURS, begin_of, damaged, parsed, text_of
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.errors import CorruptCheckpoint, UsageError


def write(out: Path, bundle: Bundle) -> None:
    """Raises UsageError where safetensors is not installed, and OSError."""
    library = installed()
    known = set(library._TYPES.values())
    tensors = {
        key: tensor.contiguous() if tensor.dtype in known else _flat(tensor)
        for key, tensor in bundle.tensors.items()
    }
    # "format" is what transformers asks for.
    metadata = {"format": "pt", OURS: text_of(bundle.document)}
    with files.writing(out, replace=False) as file:
        library.save_file(tensors, file.name, metadata)


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
