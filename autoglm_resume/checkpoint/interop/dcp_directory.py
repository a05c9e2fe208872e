"""dcp: a directory for `dcp.load` with a FileSystemReader, the states by object."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.interop.bundle import Bundle, nested
from autoglm_resume.checkpoint.interop.exported import OURS, damaged, not_ours, parsed, text_of
from autoglm_resume.checkpoint.state import decoding, tree
from autoglm_resume.errors import AutoglmError, UsageError


def write(out: Path, bundle: Bundle) -> None:
    """Raises UsageError for states that DCP cannot hold, and OSError."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = nested(bundle)
    try:
        flat, _ = flatten_state_dict(state)
    except ValueError as error:
        raise UsageError(f"{out}: DCP cannot hold it: {error}") from error
    fqns = {id(value): fqn for fqn, value in flat.items() if isinstance(value, torch.Tensor)}
    # What DCP would pickle, because it is in a tuple or was an array of NumPy.
    hidden = [key for key, tensor in bundle.tensors.items() if id(tensor) not in fqns]
    keys = {key: fqns.get(id(tensor), "") for key, tensor in bundle.tensors.items()}
    keys |= {key: f"{OURS}.tensors.{nth}" for nth, key in enumerate(hidden)}
    document = text_of({**bundle.document, "keys": keys})
    state[OURS] = {
        "document": torch.frombuffer(bytearray(document.encode()), dtype=torch.uint8),
        "tensors": {str(nth): bundle.tensors[key] for nth, key in enumerate(hidden)},
    }
    with _alone():
        save(
            state,
            storage_writer=FileSystemWriter(out),
            planner=_planner(bundle.document),
            no_dist=True,
        )


def write_state(out: Path, state: Any) -> None:
    """One state alone, as `dcp.save(model.state_dict(), …)` would. Raises OSError."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _alone():
        save(state, storage_writer=FileSystemWriter(out), no_dist=True)


def recognises(source: Path) -> bool:
    """A directory with DCP's metadata."""
    return (source / ".metadata").is_file()


def read(source: Path) -> Bundle:
    """Unpickled by DCP: only from who you trust. Raises CorruptCheckpoint, and UsageError."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(source)
    with _reading(source):
        entries = reader.read_metadata().state_dict_metadata
    size = getattr(entries.get(f"{OURS}.document"), "size", None)
    if size is None:
        raise not_ours(source)
    text = {f"{OURS}.document": torch.empty(size, dtype=torch.uint8)}
    with _alone(), _reading(source):
        load(text, storage_reader=reader, no_dist=True)
        content = bytes(tree.as_bytes(text[f"{OURS}.document"]))
        document = parsed(content.decode(errors="replace"), source)
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
    nesting = decoding.decode(encoded["planner_data"], {})

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
        raise damaged(source, "a directory of DCP that cannot be read", first) from error
    except Exception as error:
        raise damaged(source, "a directory of DCP that cannot be read", error) from error


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns of a process that works alone, as this one does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
