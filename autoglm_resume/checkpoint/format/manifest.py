"""The manifest: the document that makes parts a checkpoint. Pure.

Its own digest is taken over the canonical JSON of everything else in it, and its bytes are a
function of its content, so that two ranks that commit the same parts write the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from autoglm_resume.checkpoint.format.document import (
    Json,
    JsonNode,
    canonical,
    digest,
    indented,
    parse,
)
from autoglm_resume.checkpoint.format.ids import is_id, newer, newest_first
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.format.part import (
    FORMAT,
    Part,
    check_format,
    identity,
    part_file,
)
from autoglm_resume.checkpoint.format.structure import combined
from autoglm_resume.errors import CorruptCheckpoint

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PartRef:
    """A part as the manifest knows it: `digest` is of the bytes of its document."""

    rank: int
    file: str
    digest: str
    raw: int
    stored: int
    shared: int
    objects: Mapping[str, str]


@dataclass(frozen=True)
class Parent:
    """The checkpoint before this one, and the digest of its manifest: a link of the chain."""

    id: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    id: str
    step: int
    parent: Parent | None
    created: float
    world_size: int
    layout: Mapping[str, Json]
    model_hash: str | None
    versions: Mapping[str, str]
    parts: tuple[PartRef, ...]
    rng: bool
    data: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Ids of the older checkpoints whose packs its parts need, newest first."""
    origin: Origin | None = None
    """As rank 0 has it; None where an older version wrote it."""
    digest: str = ""
    format: int = FORMAT

    @classmethod
    def of(
        cls, parts: Sequence[Part], documents: Sequence[bytes], parent: Parent | None
    ) -> Manifest:
        """The manifest of `parts` (all ranks, in order), whose files hold `documents`.

        A function of its arguments alone. Raises CorruptCheckpoint if the parts disagree.
        """
        first = parts[0]
        for rank, part in enumerate(parts):
            for what, expected, found in (
                ("rank", rank, part.rank),
                ("id", first.id, part.id),
                ("world size", len(parts), part.world_size),
            ):
                if expected != found:
                    raise CorruptCheckpoint(
                        f"{first.id}/{part_file(rank)}: {what}: expected {expected}, found {found}"
                    )
        _require_all_chunks(parts)
        hashes = [part.model.hash for part in parts if part.model]
        manifest = cls(
            id=first.id,
            step=first.step,
            parent=parent,
            created=max(part.created for part in parts),
            world_size=first.world_size,
            layout={"kind": "per-rank"},
            model_hash=combined(hashes) if hashes else None,
            versions=first.versions,
            parts=tuple(
                PartRef(
                    rank=part.rank,
                    file=part_file(part.rank),
                    digest=digest(document),
                    raw=part.raw,
                    stored=part.stored,
                    shared=part.shared,
                    objects=part.objects,
                )
                for part, document in zip(parts, documents, strict=True)
            ),
            rng=all(part.rng for part in parts),
            data=all(part.data for part in parts),
            metrics=first.metrics,
            needs=needs_of(parts),
            origin=first.origin,
        )
        return replace(manifest, digest=_digest(manifest.to_json()))

    @property
    def raw(self) -> int:
        """Bytes of all tensors of all ranks."""
        return sum(part.raw for part in self.parts)

    @property
    def stored(self) -> int:
        """Bytes of all packs."""
        return sum(part.stored for part in self.parts)

    @property
    def shared(self) -> int:
        """Stored bytes that all parts need in older packs."""
        return sum(part.shared for part in self.parts)

    @cached_property
    def objects(self) -> dict[str, str]:
        """Digest of each object over all ranks that have it, the same for equal states."""
        found: dict[str, list[str]] = {}
        for part in self.parts:
            for name, value in part.objects.items():
                found.setdefault(name, []).append(value)
        return {name: combined(values) for name, values in found.items()}

    def to_json(self) -> Json:
        return {
            "format": self.format,
            "id": self.id,
            "step": self.step,
            "parent": asdict(self.parent) if self.parent else None,
            "created": self.created,
            "world_size": self.world_size,
            "layout": dict(self.layout),
            "model_hash": self.model_hash,
            "versions": dict(self.versions),
            "rng": self.rng,
            "data": self.data,
            "metrics": dict(self.metrics),
            "needs": list(self.needs),
            **({"origin": self.origin.to_json()} if self.origin else {}),
            "parts": [asdict(part) for part in self.parts],
            "digest": self.digest,
        }

    def encode(self) -> bytes:
        """The file: indented, because people read it."""
        return indented(self.to_json())

    @classmethod
    def decode(cls, data: bytes, file: str) -> Manifest:
        """Raises CorruptCheckpoint or NewerFormat, naming `file`."""
        node = parse(data, file)
        check_format(node)
        found = node["digest"].digest()
        try:
            expected, spelling = _digest(node.value), indented(node.value)
        except RecursionError:
            raise CorruptCheckpoint(f"{file}: nested too deeply") from None
        if expected != found:
            raise CorruptCheckpoint(f"{file}: expected digest {found}, found {expected}")
        if data != spelling:
            # The digest does not cover spaces and spelling; a changed byte is still a changed byte.
            raise CorruptCheckpoint(f"{file}: expected it as it was written, found it reformatted")
        manifest = cls(
            **identity(node),
            parent=_parent(parent) if (parent := node["parent"].optional()) else None,
            layout={key: child.value for key, child in node["layout"].members().items()},
            model_hash=m.digest() if (m := node["model_hash"].optional()) else None,
            parts=tuple(map(_part_ref, node["parts"].items())),
            metrics=node["metrics"].numbers(),
            needs=tuple(entry.text() for entry in node["needs"].items()),
            origin=Origin.from_node(o) if (o := node["origin"].optional()) else None,
            digest=found,
        )
        _check(manifest, node)
        return manifest


def needs_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """Ids of the older checkpoints whose packs `parts` need, newest first."""
    return tuple(newest_first({id for part in parts for id in part.needs}))


def _require_all_chunks(parts: Sequence[Part]) -> None:
    """What a part leaves to its peers must be with one of them."""
    there = {chunk.digest for part in parts for chunk in part.chunks if chunk.pack is not None}
    for part in parts:
        for chunk in part.chunks:
            if chunk.with_peer and chunk.digest not in there:
                raise CorruptCheckpoint(
                    f"{part.id}/{part_file(part.rank)}: expected chunk {chunk.digest} in the part"
                    " of another rank, found it in none"
                )


def _digest(document: Json) -> str:
    """Of a manifest's document, without its own digest."""
    return digest(canonical({k: v for k, v in document.items() if k != "digest"}))


def _parent(node: JsonNode) -> Parent:
    return Parent(id=node["id"].text(), digest=node["digest"].digest())


def _part_ref(node: JsonNode) -> PartRef:
    return PartRef(
        rank=node["rank"].whole(),
        file=node["file"].file_name(),
        digest=node["digest"].digest(),
        raw=node["raw"].whole(),
        stored=node["stored"].whole(),
        shared=node["shared"].whole(),
        objects=node["objects"].digests(),
    )


def _check(manifest: Manifest, node: JsonNode) -> None:
    if manifest.parent and (not is_id(manifest.parent.id) or manifest.parent.id == manifest.id):
        node["parent"].fail("the id of another checkpoint")
    if not all(is_id(id) and newer(manifest.id, id) for id in manifest.needs):
        node["needs"].fail("ids of older checkpoints")
    if len(manifest.parts) != manifest.world_size:
        node["parts"].fail(f"{manifest.world_size} parts, one per rank")
    for rank, part in enumerate(manifest.parts):
        if (part.rank, part.file) != (rank, part_file(rank)):
            node["parts"].fail(f"rank {rank} in {part_file(rank)}")
