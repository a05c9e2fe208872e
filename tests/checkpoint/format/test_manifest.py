from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autoglm_resume.checkpoint.format.document import compact, digest, digest_of_digests, indented
from autoglm_resume.checkpoint.format.manifest import Manifest, Parent
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.format.tables import (
    CHUNK_BYTES,
    Chunk,
    Fingerprint,
    Pack,
    Tensor,
    object_digest,
)
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, NewerFormat

CONTENT = digest(b"12345678")
BASE = digest(b"87654321")
OLDER = "step-0000000020.a1"


def part(rank: int = 0, **changes: Any) -> Part:
    tensor = Tensor("model/w", "float32", (2,), digest_of_digests([CONTENT]), (0,))
    state = {"model": {"w": {"$tensor": "model/w"}}, "rng": {}}
    made = Part(
        id="step-0000000030.a1",
        step=30,
        rank=rank,
        world_size=2,
        lineage=("step-0000000020.a1",),
        created=5.0 + rank,
        versions={"torch": "2.13.0"},
        model=Structure.of([("w", "float32", (2,))]),
        objects={
            "model": object_digest(state["model"], [tensor]),
            "rng": object_digest({}, []),
        },
        state=state,
        tensors=(tensor,),
        chunks=(Chunk(CONTENT, 8, 0, 8, 0, "raw"),),
        packs=(Pack("step-0000000030.a1", Fingerprint(8, 1, 2, 3)),),
        metrics={"loss": 0.5},
        rng=True,
        data=False,
    )
    return replace(made, **changes)


def sharing(**changes: Any) -> Part:
    """A part whose only tensor is a delta against a chunk in an older pack."""
    packs = (*part().packs, Pack(OLDER, Fingerprint(100, 4, 5, 6)))
    chunks = (Chunk(BASE, 8, 1, 6, 94, "raw"), Chunk(CONTENT, 8, 0, 8, 0, "delta", 0))
    tensors = (replace(part().tensors[0], chunks=(1,)),)
    return part(packs=packs, chunks=chunks, tensors=tensors, **changes)


def casting(**changes: Any) -> Part:
    """A part whose second tensor is the cast of its first."""
    first = part().tensors[0]
    half = replace(
        first, name="model/h", dtype="bfloat16", digest=digest_of_digests([BASE]), chunks=(1,)
    )
    chunks = (*part().chunks, Chunk(BASE, 4, None, codec="bfloat16", cast_of=(0,)))
    objects = {
        **part().objects,
        "model": object_digest(part().state["model"], [first, half]),
    }
    return part(tensors=(first, half), chunks=chunks, objects=objects, **changes)


def manifest(parent: Parent | None = None) -> Manifest:
    parts = [part(0), part(1)]
    return Manifest.of(parts, [p.encode() for p in parts], parent)


def test_documents_bring_back_what_was_written() -> None:
    for made in (part(), sharing(), casting()):
        assert Part.decode(made.encode(), "f") == made
    for parent in (None, Parent("step-0000000020.a1", CONTENT)):
        assert Manifest.decode(manifest(parent).encode(), "f") == manifest(parent)


def test_a_manifest_is_a_function_of_its_parts() -> None:
    made = manifest()
    assert (made.created, made.raw, made.stored, made.rng, made.data) == (6.0, 16, 16, True, False)
    assert made.model_hash == part().model.hash  # type: ignore[union-attr]
    assert made.objects == dict(part().objects)
    assert made.encode() == manifest().encode()


def test_objects_have_one_digest_whatever_the_rank_attempt_and_time() -> None:
    other = part(1, id="step-0000000030.a7", created=99.0, lineage=())
    assert other.objects == part().objects
    changed = object_digest({"w": {"$tensor": "model/w"}}, [])
    assert changed != part().objects["model"]


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_manifest_is_noticed(bit: int) -> None:
    data = manifest(Parent("step-0000000020.a1", CONTENT)).encode()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        with pytest.raises(CheckpointError, match=r"some/manifest\.json"):
            Manifest.decode(bytes(flipped), "some/manifest.json")


def test_a_part_knows_what_it_needs_of_older_packs() -> None:
    made = sharing()
    assert (made.raw, made.stored, made.shared, made.needs) == (8, 8, 6, (OLDER,))
    assert (part().shared, part().needs) == (0, ())
    parts = [made, part(1)]
    whole = Manifest.of(parts, [p.encode() for p in parts], None)
    assert (whole.stored, whole.shared, whole.needs) == (16, 6, (OLDER,))


def test_what_a_part_leaves_to_its_peers_must_be_with_one_of_them() -> None:
    left = part(
        chunks=(Chunk(CONTENT, 8, None),),
        packs=(Pack("step-0000000030.a1", Fingerprint(0, 1, 2, 3)),),
    )
    assert Part.decode(left.encode(), "f") == left
    parts = [left, part(1)]
    assert Manifest.of(parts, [p.encode() for p in parts], None).stored == 8
    parts = [left, replace(left, rank=1)]
    with pytest.raises(CorruptCheckpoint, match=r"rank-00000\.json: expected chunk blake3:\S+ in"):
        Manifest.of(parts, [p.encode() for p in parts], None)


def test_a_cast_takes_no_room_and_is_with_no_peer() -> None:
    assert (casting().raw, casting().stored, casting().needs) == (12, 8, ())
    parts = [casting(), replace(casting(), rank=1)]
    assert Manifest.of(parts, [p.encode() for p in parts], None).stored == 16


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("chunks.1.2", 0, "chunks[1][2]: expected no pack of a cast"),
        ("chunks.1.5", None, "chunks[1][5]"),
        ("chunks.1.7", [2], "chunk 1: cast: expected of 8 stored bytes, found of chunk 2 of 2"),
        ("chunks.1.7", [1], "chunk 1: cast: expected of 8 stored bytes, found of a cast"),
        ("chunks.1.7", [0, 0], "chunk 1: cast: expected of 8 stored bytes, found of 16"),
        ("chunks.1.1", 3, "chunk 1: cast: expected of whole numbers, found of 3 bytes"),
        ("chunks.1.1", 2, "chunk 1: cast: expected of 4 stored bytes, found of 8"),
    ],
)
def test_a_cast_is_of_stored_chunks_of_twice_its_size(path: str, value: Any, says: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        Part.decode(compact(set_at(json.loads(casting().encode()), path, value)), "f")
    assert says in caught.value.message


def test_every_truncation_of_a_document_is_noticed() -> None:
    for decode, data in ((Manifest.decode, manifest().encode()), (Part.decode, part().encode())):
        for size in range(len(data)):
            with pytest.raises(CorruptCheckpoint):
                decode(data[:size], "f")


def set_at(document: Any, path: str, value: Any) -> Any:
    *inner, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    place = document
    for key in inner:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", 0, "format"),
        ("format", "2", "format"),
        ("id", "step-1.a", "id"),
        ("id", "../../etc", "id"),
        ("step", 31, "step 30"),
        ("step", 30.0, "step"),
        ("step", True, "step"),
        ("rank", 2, "rank below 2"),
        ("rank", KeyError, "rank: expected a whole number from 0, found nothing"),
        ("world_size", 0, "world_size"),
        ("world_size", 10**400, "bits"),
        ("lineage", ["x"], "lineage"),
        ("lineage", ["step-0000000030.a1"], "other checkpoints"),
        ("created", "now", "created"),
        ("versions", {"torch": 2}, "versions.torch"),
        ("model", [], "model"),
        ("model.tensors", [["w", "float32"]], "model.tensors[0]"),
        ("objects.model", "blake3:0", "objects.model"),
        ("objects.model", CONTENT, "digest of model"),
        ("objects.extra", CONTENT, "objects in the state"),
        ("state", [], "state"),
        ("state.model", None, "digest of model"),
        ("metrics", {"loss": "low"}, "metrics.loss"),
        ("packs", [], "its own pack"),
        ("packs.0.id", "../elsewhere", "packs[0].id"),
        ("packs.0.id", OLDER, "its own pack: expected step-0000000030.a1"),
        ("packs.0.fingerprint.size", 9, "size of the pack"),
        ("packs.0.fingerprint.inode", -1, "inode"),
        ("tensors.0.name", "other/w", "object"),
        ("tensors.0.dtype", "object", "dtype"),
        ("tensors.0.shape", [3], "model/w: bytes: expected 12, found 8"),
        ("tensors.0.shape", [-2], "shape"),
        ("tensors.0.chunks", [1], "model/w: chunks"),
        ("tensors.0.chunks", [], "model/w: bytes"),
        ("tensors.0.digest", CONTENT, "model/w: digest"),
        ("chunks.0", [CONTENT, 8], "chunks[0]: expected 8 values"),
        ("chunks.0.0", "blake3:0", "chunks[0][0]"),
        ("chunks.0.1", 0, "chunks[0][1]"),
        ("chunks.0.1", CHUNK_BYTES + 1, "chunk 0: raw size"),
        ("chunks.0.2", 1, "chunk 0: pack: expected below 1, found 1"),
        ("chunks.0.2", -1, "chunks[0][2]"),
        ("chunks.0.3", 7, "size of the pack"),
        ("chunks.0.4", 1, "chunk 0: offset"),
        ("chunks.0.5", 1, "chunks[0][5]"),
        ("chunks.0.6", 0, "chunk 0: base: expected one in an older pack, found one in pack 0"),
        ("chunks.0.6", 5, "chunk 0: base: expected one in an older pack, found chunk 5 of 1"),
        ("chunks.0.7", [0], "chunks[0][2]: expected no pack of a cast"),
        ("chunks.0.7", [-1], "chunks[0][7]"),
        ("chunks.0.7", None, "chunks[0][7]"),
    ],
)
def test_a_part_with_a_wrong_field_is_refused_by_name(path: str, value: Any, says: str) -> None:
    document = set_at(json.loads(part().encode()), path, value)
    with pytest.raises(CorruptCheckpoint) as caught:
        Part.decode(compact(document), "dir/rank-00000.json")
    assert says in caught.value.message
    assert "dir/rank-00000.json" in caught.value.message


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("packs.1.id", "step-0000000030.a1", "packs, newest first"),
        ("packs.1.id", "step-0000000031.a1", "packs, newest first"),
        ("packs.1.fingerprint.size", 99, "chunk 0: end: expected at most 99, found 100"),
        ("chunks.0.1", 9, "found one of 9 bytes"),
        ("chunks.0.2", None, "found one in pack None"),
        ("chunks.0.2", 0, "chunk 0: offset"),
        ("chunks.0.6", 0, "found one in pack 1"),
        ("chunks.1.6", 1, "chunk 1: base: expected one in an older pack, found one in pack 0"),
        ("chunks.1.6", None, "chunks in use: expected 2, found 1"),
    ],
)
def test_a_reference_into_an_older_pack_is_checked(path: str, value: Any, says: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        Part.decode(compact(set_at(json.loads(sharing().encode()), path, value)), "f")
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("parts.0.file", "rank-00001.json", "rank 0 in rank-00000.json"),
        ("parts.0.file", "/etc/passwd", "plain file name"),
        ("parts.1", KeyError, "2 parts"),
        ("parent", {"id": "..", "digest": CONTENT}, "parent"),
        ("parent", {"id": "step-0000000030.a1", "digest": CONTENT}, "another checkpoint"),
        ("model_hash", "x", "model_hash"),
        ("layout", 3, "layout"),
        ("rng", 1, "rng"),
        ("metrics", {"loss": None}, "metrics.loss"),
        ("needs", ["step-0000000030.a1"], "needs: expected ids of older checkpoints"),
        ("needs", ["../x"], "needs: expected ids of older checkpoints"),
    ],
)
def test_a_sealed_manifest_is_still_checked_field_by_field(
    path: str, value: Any, says: str
) -> None:
    document = set_at(manifest().to_json(), path, value)
    with pytest.raises(CorruptCheckpoint) as caught:
        Manifest.decode(sealed(document), "f")
    assert says in caught.value.message


def sealed(document: Any) -> bytes:
    from autoglm_resume.checkpoint.format.document import canonical

    body = {key: value for key, value in document.items() if key != "digest"}
    return indented({**document, "digest": digest(canonical(body))})


def test_a_wrong_digest_names_both() -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        Manifest.decode(indented({**manifest().to_json(), "digest": CONTENT}), "f")
    assert CONTENT in caught.value.message
    assert manifest().digest in caught.value.message


def test_a_newer_format_names_both_numbers() -> None:
    for decode, document in (
        (Manifest.decode, manifest().to_json()),
        (Part.decode, json.loads(part().encode())),
    ):
        with pytest.raises(NewerFormat, match=r"format 7, this version reads up to format 2"):
            decode(indented({**document, "format": 7}), "f")


def test_an_older_format_is_refused_but_not_called_corrupt() -> None:
    for decode, document in (
        (Manifest.decode, manifest().to_json()),
        (Part.decode, json.loads(part().encode())),
    ):
        with pytest.raises(CheckpointError, match="expected format 2, found format 1") as caught:
            decode(indented({**document, "format": 1}), "f")
        assert not isinstance(caught.value, CorruptCheckpoint)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b'{"format": 1e999}',
        b'{"format": NaN}',
        b'{"format": 2, "digest": "%s", "x": %s}' % (CONTENT.encode(), b"[" * 900 + b"]" * 900),
    ],
    ids=lambda d: repr(d[:12]),
)  # fmt: skip
def test_bytes_that_are_no_document_are_corrupt_and_nothing_else(data: bytes) -> None:
    for decode in (Manifest.decode, Part.decode):
        with pytest.raises(CorruptCheckpoint):
            decode(data, "f")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=150)
def test_any_value_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    document = json.loads(data.draw(st.sampled_from([part(), sharing(), casting()])).encode())
    paths = [
        *document,
        *(f"tensors.0.{k}" for k in document["tensors"][0]),
        *(f"chunks.{n}.{k}" for n, row in enumerate(document["chunks"]) for k in range(len(row))),
        *(f"packs.0.{k}" for k in document["packs"][0]),
        *(f"packs.0.fingerprint.{k}" for k in document["packs"][0]["fingerprint"]),
    ]
    set_at(document, data.draw(st.sampled_from(paths)), data.draw(json_values))
    with suppress(CheckpointError):
        Part.decode(compact(document), "f")


def test_parts_that_disagree_are_not_one_checkpoint() -> None:
    for changes in (
        {"rank": 0},
        {"world_size": 3},
        {"id": "step-0000000030.a2"},
    ):
        parts = [part(0), replace(part(1), **changes)]
        with pytest.raises(CorruptCheckpoint):
            Manifest.of(parts, [p.encode() for p in parts], None)
