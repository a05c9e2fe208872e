"""The files that other tools read: safetensors, torch.save, and plain DCP. Imports torch.

safetensors   one file: all tensors by key, the document in its metadata
torch         one file for `torch.load`: the states by object, as scripts know them
dcp           a directory for `dcp.load` with a FileSystemReader: the same states

NumPy's arrays and scalars, frozen sets and default dicts would keep `torch.load` from loading a
file as it does by default (weights_only). There they are tensors, numbers, sets and dicts;
importing the file again brings back what they were.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import Json, compact
from autoglm_resume.checkpoint.interop.bundle import Bundle, nested
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.errors import AutoglmError, CorruptCheckpoint, UsageError

OURS = "autoglm"
"""Key, in metadata and states, of what only an import needs."""


def check(kind: str, out: Path) -> None:
    """Raises UsageError when `write` would."""
    if kind not in _WRITERS:
        raise UsageError(f"--to {kind}: expected one of {', '.join(_WRITERS)}")
    if out.exists():
        raise UsageError(f"{out}: there already, and never overwritten")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no directory {out.absolute().parent}")
    if kind == "safetensors":
        _safetensors()


def write(kind: str, out: Path, exchange: Bundle) -> None:
    """Make `out`, which must not be there. Raises UsageError and OSError."""
    check(kind, out)
    _WRITERS[kind](out, exchange)


def read(source: Path) -> Bundle:
    """What `write` has made. A plain DCP directory is unpickled by DCP: only from who you trust.

    Raises UsageError when it is something else, and CorruptCheckpoint.
    """
    if source.is_dir():
        return _read_dcp(source)
    if not source.exists():
        raise UsageError(f"{source}: no such file or directory")
    with source.open("rb") as file:
        begin = file.read(16)
    if begin.startswith(b"PK"):
        return _read_torch(source)
    # Eight bytes of length, and a JSON object.
    if begin[8:9] == b"{":
        return _read_safetensors(source)
    found = f"a file that begins with {begin!r}" if begin else "an empty file"
    raise UsageError(f"{source}: expected {_EXPECTED}, found {found}", hint=_AGAIN)


def _write_safetensors(out: Path, exchange: Bundle) -> None:
    library = _safetensors()
    known = set(library._TYPES.values())
    tensors = {
        key: tensor if tensor.dtype in known else _flat(tensor)
        for key, tensor in exchange.tensors.items()
    }
    # "format" is what transformers asks for.
    metadata = {"format": "pt", OURS: _text(exchange.document)}
    with files.writing(out, replace=False) as file:
        library.save_file(tensors, file.name, metadata)


def _read_safetensors(source: Path) -> Bundle:
    library = _safetensors()
    from safetensors import SafetensorError

    try:
        with library.safe_open(source, framework="pt") as found:
            document = _parsed((found.metadata() or {}).get(OURS), source)
            tensors = {
                key: _shaped(found.get_tensor(key), dtype, shape)
                for key, (dtype, shape) in document["tensors"].items()
            }
    except SafetensorError as error:
        raise _damaged(source, "a safetensors file that cannot be read", error) from error
    return Bundle(document, tensors)


def _write_torch(out: Path, exchange: Bundle) -> None:
    # Tensors that are in the state twice are in the file once.
    ours = {"document": _text(exchange.document), "tensors": dict(exchange.tensors)}
    with files.writing(out, replace=False) as file:
        torch.save({**_plain(nested(exchange)), OURS: ours}, file)


def _read_torch(source: Path) -> Bundle:
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever untrusted bytes can make of it
        raise _damaged(source, "an archive that torch.load does not take", error) from error
    ours = found.get(OURS) if isinstance(found, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("tensors"), dict):
        raise _foreign(source)
    document = _parsed(ours.get("document"), source)
    return Bundle(document, ours["tensors"])


def _write_dcp(out: Path, exchange: Bundle) -> None:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = nested(exchange)
    try:
        flat, _ = flatten_state_dict(state)
    except ValueError as error:
        raise UsageError(f"{out}: DCP cannot hold it: {error}") from error
    places = {id(value): fqn for fqn, value in flat.items() if isinstance(value, torch.Tensor)}
    # What DCP would pickle, because it is in a tuple or was an array of NumPy.
    hidden = [key for key, tensor in exchange.tensors.items() if id(tensor) not in places]
    keys = {key: places.get(id(tensor), "") for key, tensor in exchange.tensors.items()}
    keys |= {key: f"{OURS}.tensors.{place}" for place, key in enumerate(hidden)}
    document = _text({**exchange.document, "keys": keys})
    state[OURS] = {
        "document": torch.frombuffer(bytearray(document.encode()), dtype=torch.uint8),
        "tensors": {str(place): exchange.tensors[key] for place, key in enumerate(hidden)},
    }
    with _alone():
        save(
            state,
            storage_writer=FileSystemWriter(out),
            planner=_planner(exchange.document),
            no_dist=True,
        )


def _read_dcp(source: Path) -> Bundle:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (source / ".metadata").exists():
        raise UsageError(
            f"{source}: expected a file, or a directory that DCP has written; found no .metadata"
        )
    reader = FileSystemReader(source)
    with _reading(source):
        entries = reader.read_metadata().state_dict_metadata
    size = getattr(entries.get(f"{OURS}.document"), "size", None)
    if size is None:
        raise _foreign(source)
    text = {f"{OURS}.document": torch.empty(size, dtype=torch.uint8)}
    with _alone(), _reading(source):
        load(text, storage_reader=reader, no_dist=True)
        content = bytes(tree.as_bytes(text[f"{OURS}.document"]))
        document = _parsed(content.decode(errors="replace"), source)
        empty = {
            document["keys"][key]: torch.empty(shape, dtype=tree.dtype_named(dtype))
            for key, (dtype, shape) in document["tensors"].items()
        }
        load(empty, storage_reader=reader, no_dist=True)
    return Bundle(document, {key: empty[document["keys"][key]] for key in document["tensors"]})


def _planner(document: Mapping[str, Json]) -> Any:
    """DCP's own, but for what it has pickled before: that is written as it is."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

    if not document["dcp"]:
        return DefaultSavePlanner()
    encoded = next(r["state"]["dcp"] for r in document["ranks"] if "dcp" in r["state"])
    nesting = tree.decode(encoded["planner_data"], {})

    class AsItIs(DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            if isinstance(object, bytes):
                return io.BytesIO(object)
            return super().transform_object(write_item, object)

        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            plans, metadata = super().create_global_plan(all_plans)
            return plans, replace(
                metadata, planner_data={**metadata.planner_data, **(nesting or {})}
            )

    return AsItIs()


_WRITERS: Mapping[str, Callable[[Path, Bundle], None]] = {
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "dcp": _write_dcp,
}


def _plain(value: Any) -> Any:
    """Of types that torch.load takes by default."""
    kind = type(value)
    if kind is dict or kind is defaultdict:
        return {key: _plain(child) for key, child in value.items()}
    if kind is OrderedDict:
        copy = OrderedDict((key, _plain(child)) for key, child in value.items())
        if hasattr(value, "_metadata"):
            copy._metadata = _plain(value._metadata)  # type: ignore[attr-defined]
        return copy
    if kind in (list, tuple):
        return kind(_plain(child) for child in value)
    if kind in (set, frozenset):
        return {_plain(child) for child in value}
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray:
        try:
            return torch.from_numpy(value)
        except TypeError:  # of text, of times
            return value.tolist()
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    return value


def _safetensors() -> Any:
    try:
        import safetensors.torch as library
    except ImportError as error:
        raise UsageError(
            f"safetensors is not installed ({error})",
            hint="pip install 'autoglm-resume[safetensors]'",
        ) from error
    return library


def _text(document: Json) -> str:
    return compact(document).decode()


def _parsed(text: object, source: Path) -> dict[str, Json]:
    if not isinstance(text, str):
        raise _foreign(source)
    try:
        document: dict[str, Json] = json.loads(text)
        if Bundle(document, {}).raw >= 0:
            return document
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise CorruptCheckpoint(f"{source}: its document is not as written")


_EXPECTED = "what autoglm export writes (safetensors, torch.save or DCP)"
_AGAIN = (
    "export it again; what others have made, load in your script, track() what it holds, and save"
)


def _damaged(source: Path, found: str, error: BaseException) -> CorruptCheckpoint:
    # What the libraries say goes on for pages.
    reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
    return CorruptCheckpoint(
        f"{source}: expected {_EXPECTED}, found {found} ({reason or type(error).__name__})",
        hint=_AGAIN,
    )


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Whatever untrusted files make DCP raise, as one error that names them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except AutoglmError:
        raise
    except CheckpointException as error:  # not an Exception
        first = next(iter(error.failures.values()), (error, None))[0]
        raise _damaged(source, "a directory of DCP that cannot be read", first) from error
    except Exception as error:
        raise _damaged(source, "a directory of DCP that cannot be read", error) from error


def _foreign(source: Path) -> UsageError:
    return UsageError(
        f"{source}: not made by autoglm export",
        hint="load it in your script, track() what it holds, and save",
    )


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


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns of a process that works alone, as this one does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
