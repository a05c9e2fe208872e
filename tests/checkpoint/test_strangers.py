"""Checkpoints of people who mean no good are refused, in no more memory than they are worth."""

from __future__ import annotations

import copy
import json
import os
import socket
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.chunks import memory
from autoglm_resume.checkpoint.format.document import digest, digest_of_digests
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.part import Part, pack_file, part_file
from autoglm_resume.checkpoint.format.tables import (
    CHUNK_BYTES,
    Chunk,
    Fingerprint,
    Pack,
    object_digest,
)
from autoglm_resume.checkpoint.interop import formats
from autoglm_resume.checkpoint.interop.adopt import adopt
from autoglm_resume.checkpoint.interop.bundle import Bundle
from autoglm_resume.checkpoint.interop.gather import gather
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import AutoglmError, CheckpointError, CorruptCheckpoint, UsageError
from tests.checkpoint.format.test_manifest import part
from tests.observe.runs import checkpoint

ID = "step-0000000020.a0"
MANY = 200_000


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 << 30)


anything_else = pytest.mark.parametrize("make", [pipe, device, listening, Path.mkdir, holes])


@anything_else
@pytest.mark.parametrize("file", [MANIFEST, part_file(0), pack_file(0)])
def test_what_is_no_such_file_is_no_good_checkpoint_and_read_by_nobody(
    make: Callable[[Path], None], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "checkpoints", 20, ranks=1)
    (path / file).unlink()
    make(path / file)
    found = examine(Store(path.parent), path, deep=True)
    assert not found.integrity.ok
    assert not found.integrity.unreadable, "the next older one can be taken"
    assert file in found.integrity.problem
    with pytest.raises(CheckpointError):
        gather(Store(path.parent), path)


@anything_else
def test_what_is_no_such_file_is_not_imported(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "out")
    with pytest.raises((AutoglmError, UsageError), match="out"):
        formats.read(tmp_path / "out")


def repeating(count: int) -> Part:
    """A part whose tensor is one stored chunk over and over: 2 bytes of JSON for a mebibyte."""
    chunk = digest(bytes(CHUNK_BYTES))
    tensor = replace(
        part().tensors[0],
        shape=(count, CHUNK_BYTES // 4),
        digest=digest_of_digests([chunk] * count),
        chunks=(0,) * count,
    )
    state = part().state
    objects = {**part().objects, "model": object_digest(state["model"], [tensor])}
    return part(
        tensors=(tensor,),
        chunks=(Chunk(chunk, CHUNK_BYTES, 0, 60, 0, "zstd"),),
        packs=(Pack(part().id, Fingerprint(60, 1, 2, 3)),),
        objects=objects,
    )


def grown(key: str, value: Any) -> bytes:
    document = json.loads(part().encode())
    *above, last = key.split(".")
    node = document
    for name in above:
        node = node[int(name) if name.isdecimal() else name]
    node[last] = value
    return json.dumps(document, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "document",
    [
        repeating(MANY).encode(),
        grown("tensors.0.chunks", [0] * MANY),
        grown("tensors.0.shape", [1] * MANY),
        *(grown(key, [0] * MANY) for key in ("chunks", "tensors", "packs", "lineage")),
        *(grown(key, [[]] * MANY) for key in ("chunks", "tensors", "packs", "lineage")),
    ],
    ids=range(11),
)
def test_a_document_takes_memory_in_proportion_to_its_size(document: bytes) -> None:
    tracemalloc.start()
    try:
        Part.decode(document, "part")
    except CheckpointError as error:
        assert len(error.message) < 1000  # noqa: PT017
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50 * len(document)


def test_a_tensor_larger_than_memory_is_refused_before_any_is_taken() -> None:
    decoded = Part.decode(repeating(MANY).encode(), "part")
    with pytest.raises(CheckpointError, match=r"as there is memory, found 209715200000"):
        memory.require("part", decoded.tensors)
    memory.require("part", part().tensors)


@pytest.mark.parametrize(
    "shape", [[10**18], [2**62, 2**62], [0, 2**60], [2**40] * 1000, [-1], [1.5], [True], "1"]
)
def test_a_shape_that_cannot_be_is_refused(shape: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"shape|chunks|bytes"):
        Part.decode(grown("tensors.0.shape", shape), "part")


WICKED = st.sampled_from(
    [
        *(10**400, 2**63, -1, 1.7e308, True, None, "", "x" * 10_000, "\u202e\x1b[2J"),
        *({}, [], [[]], {"$tensor": "model/w"}, ["a"], [0] * 50),
        json.loads("[" * 100 + "]" * 100),
    ]
).map(copy.deepcopy)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a document that something else can be put into."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += nodes(value[key])
    return found


@given(st.data())
def test_whatever_stands_in_a_part_it_is_one_or_refused(data: st.DataObject) -> None:
    document = json.loads(part().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(nodes(document)))
        holder[key] = data.draw(WICKED)
    try:
        found = Part.decode(json.dumps(document).encode(), "part")
    except CheckpointError as error:
        assert len(error.message) < 20_000  # noqa: PT017
    else:
        assert found.raw < 2**63
        assert Part.decode(found.encode(), "part") == found


def test_a_figure_that_no_computer_holds_is_refused() -> None:
    document = json.loads(part().encode())
    document["metrics"] = {"loss": 10**400}
    with pytest.raises(CorruptCheckpoint, match=r"metrics\.loss: expected a number"):
        Part.decode(json.dumps(document).encode(), "part")


def test_two_members_of_one_name_are_refused() -> None:
    twice = part().encode().replace(b'"step":30', b'"step":30,"step":30', 1)
    with pytest.raises(CorruptCheckpoint, match="two members of one name"):
        Part.decode(twice, "part")


def test_a_document_of_ranks_that_have_more_than_all_of_a_tensor_is_refused(tmp_path: Path) -> None:
    bundle = gather(Store(tmp_path), checkpoint(tmp_path, 20, ranks=1))
    (row,) = [r for r in bundle.document["ranks"][0]["tensors"] if r["name"] == "model/weight"]
    pieces = [{**row, "offset": [n, 0], "shape": [7, 8]} for n in (0, 1)]
    rank = {**bundle.document["ranks"][0], "tensors": pieces}
    with pytest.raises(CorruptCheckpoint, match="more than all of it"):
        adopt(Store(tmp_path / "to"), Bundle({**bundle.document, "ranks": [rank]}, bundle.tensors))


def test_a_tensor_with_more_elements_than_memory_is_not_imported(tmp_path: Path) -> None:
    bundle = gather(Store(tmp_path), checkpoint(tmp_path, 20, ranks=1))
    (key,) = [key for key in bundle.tensors if key.endswith("weight")]
    expanded = {**bundle.tensors, key: torch.full((1, 1), 20.0).expand(8, 8)}
    with pytest.raises(CorruptCheckpoint, match="expected all of its elements"):
        adopt(Store(tmp_path / "to"), Bundle(bundle.document, expanded))


def test_an_archive_that_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(tmp_path / "out", "w") as out,
    ):
        for entry in plain.infolist():
            out.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptCheckpoint, match="its entries are compressed"):
        formats.read(tmp_path / "out")


def test_checkpoints_of_equal_chunks_are_read_as_ever(tmp_path: Path) -> None:
    """What repeats is stored once in every honest checkpoint, too."""
    from autoglm_resume.checkpoint.state import capture, restore
    from autoglm_resume.checkpoint.write.part_writer import PartWriter

    state = {"model": {"zeros": torch.zeros(5 * CHUNK_BYTES // 4), "few": torch.zeros(3)}}
    taken = capture.take(state, id=ID, rank=0, world_size=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(PartWriter(Store(tmp_path)).persist, taken).result()
    found = restore.read(Store(tmp_path), tmp_path / ID, 0)
    assert torch.equal(found.states["model"]["zeros"], state["model"]["zeros"])
