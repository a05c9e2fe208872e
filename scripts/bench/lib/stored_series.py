"""Checkpoints of one training, one after the other, in a store of their own: what `size` weighs.

Beside what the engine stored: the bytes of torch.save, and the order-0 entropy of the planes that
were stored, which no coder that takes bytes one by one can go below.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from autoglm_resume.checkpoint.chunks import codec
from autoglm_resume.checkpoint.chunks.codec import Effort
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter


class Series:
    """Checkpoints with one setting of `compress`, in the directory `root`."""

    def __init__(self, root: Path, compress: Effort) -> None:
        self.store = Store(root)
        self.compress = compress
        self.saver = PartWriter(self.store, SaveOptions(compress=compress))
        self.torch_bytes = 0
        self.bound_bytes = 0.0
        self.codecs: Counter[str] = Counter()
        """Chunks by their codec; "cast" are those that others determine, "shared" those that are
        stored already."""
        self._saved: list[tuple[str, str]] = []
        self._previous: Snapshot | None = None

    def __len__(self) -> int:
        return len(self._saved)

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Store a state that nobody changes any more."""
        file = io.BytesIO()
        torch.save(state, file)
        self.torch_bytes += file.tell()
        id = checkpoint_id(step, "a0")
        lineage = tuple(id for id, _ in reversed(self._saved))
        snapshot = capture.take(state, id=id, rank=0, world_size=1, lineage=lineage)
        part = self.saver.persist(snapshot).part
        self._count(part, snapshot)
        self._saved.append((id, content(state)))
        self._previous = snapshot

    def _count(self, part: Part, snapshot: Snapshot) -> None:
        before = {t.name: t.data for t in self._previous.tensors} if self._previous else {}
        seen: set[int] = set()
        for tensor, entry in zip(part.tensors, snapshot.tensors, strict=True):
            for place, index in enumerate(tensor.chunks):
                chunk = part.chunks[index]
                if chunk.cast_of:
                    self.codecs["cast"] += 1
                    continue
                if index in seen or chunk.pack is None or part.packs[chunk.pack].id != part.id:
                    self.codecs["shared"] += 1
                    continue
                seen.add(index)
                where = slice(place * CHUNK_BYTES, place * CHUNK_BYTES + chunk.raw)
                items = np.frombuffer(entry.data[where], np.uint8)
                base = None
                if chunk.base is not None:
                    base = np.frombuffer(before[tensor.name][where], np.uint8)
                self.bound_bytes += sum(map(entropy, codec.planes(chunk.codec, items, base)))
                self.codecs[chunk.codec] += 1

    def stored_bytes(self) -> int:
        """Of all files of the store."""
        return sum(file.stat().st_size for file in self.store.root.rglob("*") if file.is_file())

    def pack_bytes(self) -> int:
        """Of encoded chunks alone."""
        return sum(file.stat().st_size for file in self.store.root.rglob("*.pack"))

    def all_exact(self) -> bool:
        """Whether every checkpoint, read from its files, is what was saved, bit by bit."""
        paths = {path.name: path for path in self.store.committed()}
        return all(
            id in paths and content(restore.read(self.store, paths[id], 0).states) == expected
            for id, expected in self._saved
        )


def entropy(plane: codec.Bytes) -> float:
    """Bytes that a plane takes at least if every byte is coded by its frequency in the plane."""
    counts = np.bincount(plane, minlength=256)
    counts = counts[counts > 0]
    return float((counts * np.log2(plane.size / counts)).sum() / 8)


def content(state: Any) -> str:
    """Digest of everything in a state: values, types, shapes and bytes."""
    found = blake3()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(flat.numpy().data)
        elif isinstance(value, Mapping):
            for key, member in value.items():
                found.update(f"{key!r}:".encode())
                walk(member)
        elif isinstance(value, (list, tuple)):
            found.update(f"{type(value)}{len(value)}".encode())
            for member in value:
                walk(member)
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


KINDS = {"weights": "model/", "first moments": ".exp_avg", "second moments": ".exp_avg_sq"}


def speeds(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """GB of raw bytes per second, encoding `after` and decoding it, on 1 and on 2 threads."""
    taken = [
        {t.name: t.data for t in capture.take(state, id=id, rank=0, world_size=1).tensors}
        for state, id in ((before, checkpoint_id(1, "a0")), (after, checkpoint_id(2, "a0")))
    ]
    found = []
    for kind, mark in KINDS.items():
        chunks = [
            (data[start:][:CHUNK_BYTES], taken[0][name][start:][:CHUNK_BYTES])
            for name, data in taken[1].items()
            if name.startswith(mark) or name.endswith(mark)
            for start in range(0, len(data), CHUNK_BYTES)
        ]
        efforts: tuple[Effort, Effort] = ("fast", "small")
        for effort in efforts:
            found.append({"of": kind, "compress": effort, **_speed(chunks, effort)})
    return found


def _speed(chunks: list[tuple[memoryview, memoryview]], effort: Effort) -> dict[str, Any]:
    encoded = [codec.encode(chunk, "float32", effort, base) for chunk, base in chunks]
    raw = sum(len(chunk) for chunk, _ in chunks)
    room = [memoryview(bytearray(len(chunk))) for chunk, _ in chunks]

    def encode(index: int) -> None:
        codec.encode(chunks[index][0], "float32", effort, chunks[index][1])

    def decode(index: int) -> None:
        codec.decode(encoded[index].codec, encoded[index].data, room[index], chunks[index][1])

    def rate(work: Callable[[int], None], threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(len(chunks))))  # each thread makes its coders
            began = time.perf_counter()
            list(pool.map(work, range(len(chunks))))
            return raw / (time.perf_counter() - began) / 1e9

    return {
        "codec": Counter(e.codec for e in encoded).most_common(1)[0][0],
        "fraction": sum(len(e.data) for e in encoded) / raw,
        "encode": [max(rate(encode, n) for _ in range(3)) for n in (1, 2)],
        "decode": [max(rate(decode, n) for _ in range(3)) for n in (1, 2)],
    }
