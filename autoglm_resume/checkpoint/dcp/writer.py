"""Saving through DCP: what its planner made, into packs, parts and a manifest."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, get_args

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.compression import Throughput
from autoglm_resume.checkpoint.chunks.cut import Item, chunks_of
from autoglm_resume.checkpoint.dcp.boxes import STATE
from autoglm_resume.checkpoint.dcp.metadata import key_of, to_json
from autoglm_resume.checkpoint.dcp.paths import (
    METADATA,
    AnyPath,
    directory_of,
    given,
    is_numbered,
)
from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.options import Compress
from autoglm_resume.checkpoint.format.part import pack_file, part_file
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.tables import Pack
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.checkpoint.state.capture import torch_versions
from autoglm_resume.checkpoint.store.commit import commit
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.pack_writer import THREADS, Packer
from autoglm_resume.checkpoint.write.part_writer import (
    SaveFailed,
    discard,
    make_directory,
    part_of,
    retried,
)
from autoglm_resume.checkpoint.write.reuse import ChunkTable, Sharing
from autoglm_resume.errors import CorruptCheckpoint, UsageError

_THROUGHPUTS: dict[Path, Throughput] = {}
"""How fast each directory takes bytes, as far as this process knows."""


@dataclass(frozen=True)
class _Written:
    """The coordinator's part but for the metadata, which comes last."""

    snapshot: Snapshot
    table: ChunkTable
    rows: Mapping[tuple[str, int], int]


class Writer(StorageWriter):
    """For `dcp.save` and `dcp.async_save`; one may serve all saves of a run, one after the other.

    `path` is that of one checkpoint (see `directory_of`), as is a `checkpoint_id` given to DCP.
    A committed checkpoint is never overwritten. What a save that died has left under its name is
    removed by the next save of that name; it never was a checkpoint.

    Tensors in host memory are not copied; others one at a time. DCP raises its CheckpointException
    on all ranks if one fails, with our SaveFailed or UsageError in it.
    """

    def __init__(self, path: AnyPath | None = None, compress: Compress = "auto") -> None:
        if compress not in get_args(Compress):
            raise UsageError(f"compress: expected one of {get_args(Compress)}, found {compress!r}")
        self._compress: Compress = compress
        self._path = None if path is None else directory_of(path)
        self._rank = 0
        self._coordinator = True
        self._written: _Written | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: AnyPath) -> bool:
        """Whether it ends in a number."""
        return is_numbered(checkpoint_id)

    @property
    def checkpoint_id(self) -> Path | None:
        """The checkpoint's directory, once one is named."""
        return self._path

    def storage_meta(self) -> StorageMeta:
        """For planners that want to know the directory."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def reset(self, checkpoint_id: AnyPath | None = None) -> None:
        """DCP calls it before a save that names its checkpoint."""
        if checkpoint_id is not None:
            self._path = directory_of(checkpoint_id)

    # DCP tells the rank only to a parameter of this very name.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises UsageError when the checkpoint exists."""
        if not kwargs.get("use_collectives", True):
            raise UsageError("use_collectives=False makes one checkpoint per rank, not one of all")
        self._rank = kwargs.get("rank", 0)
        self._coordinator = is_coordinator
        self._written = None
        path = given(self._path)
        if (path / MANIFEST).exists():
            raise UsageError(
                f"{path}: committed already, and never overwritten",
                hint="save under another step, or remove that directory first",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Each with the number of ranks; DCP keeps that with plans that it caches.

        No rank has begun to write, so whatever is under the name was left by a save that died.
        """
        path = given(self._path)
        if path.exists():
            Store(path.parent).delete(path.name)
        return [replace(plan, storage_data=len(plans)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pack, read it back, and (but for the coordinator) its part."""
        path = given(self._path)
        planned = _named(plan.items)

        def write() -> list[tuple[WriteItem, TensorBytes]]:
            return self._write(path, planned, planner, plan.storage_data)

        pack = path / pack_file(self._rank)
        expected = sum(item.tensor_storage_size() or 0 for item in plan.items)
        written = retried(write, pack, expected, Event())
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(i.index, t.nbytes, self._rank) for i, t in written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the coordinator's part, and commit."""
        assert self._written is not None, "finish() comes after write_data(), and only here"
        written, self._written = self._written, None
        path = given(self._path)
        homes = {key_of(r.index): r.storage_data for of_rank in results for r in of_rank}
        trees = {**written.snapshot.trees, METADATA: to_json(metadata, homes)}
        written = replace(written, snapshot=replace(written.snapshot, trees=trees))

        def finished() -> None:
            if not (path / part_file(self._rank)).exists():
                _write_part(path, written)
            if commit(Store(path.parent), path.name) is None:
                raise CorruptCheckpoint(f"{path}: expected the parts of all ranks, found some gone")

        retried(finished, path / MANIFEST, 0, Event())

    def _write(
        self, path: Path, planned: Mapping[str, WriteItem], planner: SavePlanner, world_size: int
    ) -> list[tuple[WriteItem, TensorBytes]]:
        make_directory(path)
        pack = path / pack_file(self._rank)
        source = _Source(planned, planner)
        throughput = _THROUGHPUTS.setdefault(path.parent, Throughput())
        table = ChunkTable(path.name, None)
        try:
            with (
                ThreadPoolExecutor(THREADS, thread_name_prefix="encode") as pool,
                # Two saves of one name at once must not make one checkpoint of both.
                files.writing(pack, replace=False) as output,
            ):
                packer = Packer(output, Sharing(None, 0, ()), table, frozenset(), throughput)
                rows = packer.write(source, pool, self._compress, lambda: None)
            snapshot = self._describe(path, planned, source.tensors, world_size)
            written = _Written(snapshot, table, rows)
            if self._coordinator:
                self._written = written
            else:
                _write_part(path, written)
        except FileExistsError as error:
            raise SaveFailed(f"{error.filename2 or pack}: written by another save") from None
        except BaseException:
            discard(path / part_file(self._rank), pack)
            raise
        return list(zip(planned.values(), source.tensors, strict=True))

    def _describe(
        self,
        path: Path,
        planned: Mapping[str, WriteItem],
        tensors: Sequence[TensorBytes],
        world_size: int,
    ) -> Snapshot:
        return Snapshot(
            id=path.name,
            step=step_of(path.name),
            rank=self._rank,
            world_size=world_size,
            lineage=(),
            created=time.time(),
            versions=torch_versions(),
            model=None,
            trees={STATE: [_leaf(name, item) for name, item in planned.items()]},
            tensors=tensors,
            rng=False,
            data=False,
        )


def _write_part(path: Path, written: _Written) -> None:
    rank = written.snapshot.rank
    # The fingerprint is taken after the rename, which changes the ctime.
    own = Pack(path.name, verify.fingerprint(path / pack_file(rank)))
    part = part_of(written.snapshot, written.table, own, written.rows)
    files.write(path / part_file(rank), part.encode(), replace=False)


def _named(items: Sequence[WriteItem]) -> dict[str, WriteItem]:
    """Each with the name that its tensor gets in the part."""
    named: dict[str, WriteItem] = {}
    for item in items:
        base = name = f"{STATE}/{item.index.fqn}"
        if item.type == WriteItemType.SHARD and item.index.offset is not None:
            base = name = f"{name}@{','.join(map(str, item.index.offset))}"
        clash = 1
        while name in named:
            clash += 1
            name = f"{base}~{clash}"
        named[name] = item
    return named


def _leaf(name: str, item: WriteItem) -> Json:
    """A piece in the state tree: its key, and its tensor."""
    fqn, offset = key_of(item.index)
    return [fqn, None if offset is None else list(offset), {"$tensor": name}]


class _Source:
    """The chunks of all pieces; each is brought to host memory when its turn has come."""

    def __init__(self, planned: Mapping[str, WriteItem], planner: SavePlanner) -> None:
        self._planned = planned
        self._planner = planner
        self.tensors: list[TensorBytes] = []
        """What has passed, only described."""

    def __iter__(self) -> Iterator[Item]:
        for name, item in self._planned.items():
            content = self._planner.resolve_data(item)
            if isinstance(content, io.BytesIO):
                data = content.getbuffer()
                tensor = TensorBytes(name, "uint8", (len(data),), data)
            else:
                host = _on_host(content, name)
                dtype = tree.dtype_name(host.dtype)
                tensor = TensorBytes(name, dtype, tuple(host.shape), tree.as_bytes(host))
            self.tensors.append(replace(tensor, data=memoryview(b"")))
            yield from chunks_of(tensor)


def _on_host(tensor: torch.Tensor, name: str) -> torch.Tensor:
    # The encoder of state trees knows what can be saved.
    tree.encode(torch.nn.Parameter(tensor.detach(), False), name)
    if is_traceable_wrapper_subclass(tensor):
        raise UsageError(f"{name}: a {type(tensor).__qualname__} cannot be saved without pickle")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
