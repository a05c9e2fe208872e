"""Loading through DCP: everything is verified before anything is overwritten."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.dcp.boxes import Load, Wanted, loads_of, pieces_of, wanted_of
from autoglm_resume.checkpoint.dcp.metadata import Key, from_json, key_of
from autoglm_resume.checkpoint.dcp.paths import (
    METADATA,
    AnyPath,
    directory_of,
    given,
    is_numbered,
)
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CorruptCheckpoint, UsageError


class Reader(StorageReader):
    """For `dcp.load`, of what a Writer has saved; `path` as there.

    All that a rank asks for is read into host memory and verified while DCP plans, that is before
    any rank overwrites a tensor: a checkpoint that turns out bad on one rank leaves the models of
    all ranks as they were. It takes as much host memory as the rank's share of the state.

    What is no tensor was pickled by DCP's planner, and is unpickled by it.
    """

    def __init__(self, path: AnyPath | None = None) -> None:
        self._path = None if path is None else directory_of(path)
        self._homes: Mapping[Key, int] = {}
        self._staged: dict[Wanted, torch.Tensor] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: AnyPath) -> bool:
        """Whether it ends in a number."""
        return is_numbered(checkpoint_id)

    @property
    def checkpoint_id(self) -> Path | None:
        """The checkpoint's directory, once one is named."""
        return self._path

    def reset(self, checkpoint_id: AnyPath | None = None) -> None:
        """DCP calls it before a load that names its checkpoint."""
        if checkpoint_id is not None:
            self._path = directory_of(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """Raises CheckpointError, and UsageError for a checkpoint that no Writer made."""
        path = given(self._path)
        store = Store(path.parent)
        for ref in store.load_manifest(path).parts:
            if METADATA in ref.objects:
                part = store.load_part(path, ref.rank)
                metadata = from_json(part.state[METADATA], str(path / ref.file))
                metadata.storage_meta = StorageMeta(checkpoint_id=path)
                return metadata
        raise UsageError(
            f"{path}: not saved through DCP",
            hint="a session restores it: autoglm_resume.init().resume()",
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """`metadata` is what `read_metadata` returned."""
        self._homes = metadata.storage_data
        self._staged = {}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read and verify everything in it. Raises CheckpointError."""
        self._stage(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what was verified into the tensors of the script."""
        self._stage([item for item in plan.items if wanted_of(item) not in self._staged])
        ordered = sorted(plan.items, key=lambda item: item.type != LoadItemType.BYTE_IO)
        for item in ordered:
            found = self._staged[wanted_of(item)]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(tree.as_bytes(found)))
                continue
            target = planner.resolve_tensor(item).detach()
            if target.shape != found.shape:
                raise UsageError(
                    f"{item.storage_index.fqn}: expected room for {list(found.shape)}, found"
                    f" {list(target.shape)}"
                )
            target.copy_(found)
            planner.commit_tensor(item, target)
        self._staged = {}
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stage(self, items: Sequence[ReadItem]) -> None:
        if not items:
            return
        path = given(self._path)
        store = Store(path.parent)
        wanted: dict[int, dict[Key, list[ReadItem]]] = {}
        for item in items:
            key = key_of(item.storage_index)
            if key not in self._homes:
                raise UsageError(f"{path}: {key[0]} at {key[1]}: no rank has stored it")
            wanted.setdefault(self._homes[key], {}).setdefault(key, []).append(item)
        parts = {rank: store.load_part(path, rank) for rank in wanted}
        loads: list[Load] = []
        for rank, pieces in wanted.items():
            tensors = pieces_of(parts[rank])
            for key, of_piece in pieces.items():
                if key not in tensors:
                    raise CorruptCheckpoint(f"{path}: rank {rank}: expected {key} there")
                self._staged.update(loads_of(parts[rank], tensors[key], of_piece, loads))
        with ChunkReader(path, list(parts.values())) as reader:
            verify.on_threads(
                len(loads),
                lambda i, _: reader.read(
                    loads[i].part, loads[i].chunk, loads[i].target, loads[i].name
                ),
                lambda: memoryview(b""),
            )
