from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from autoglm_resume.events import Branched
from autoglm_resume.journal import encode
from autoglm_resume.observe import inspection
from tests.observe.runs import Script, checkpoint, directory, flip

FIRST, SECOND = "step-0000000010.a0", "step-0000000020.a0"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    path = tmp_path_factory.mktemp("pristine") / "demo"
    run = Script().life().attempt(0)
    checkpoint(path / "checkpoints", 10)
    made = checkpoint(path / "checkpoints", 20, lineage=(FIRST,))
    hash = Store(path / "checkpoints").load_manifest(made).model_hash
    run.both("model", attempt=0, hash=hash, model=None)
    return directory(path, run.events)


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    copy = shutil.copytree(pristine, tmp_path / "demo")
    document = (copy / "job.json").read_text().replace(str(pristine), str(copy))
    (copy / "job.json").write_text(document)
    return copy


def look(path: Path) -> inspection.Inspection:
    target = inspection.find(path)
    return inspection.inspect(target, target.paths[0], inspection.expectation(target.run))


def text_of(found: inspection.Inspection) -> str:
    tables = inspection.tables(found, tensors=True)
    return "\n".join(line for table in tables for line in table.lines())


def test_a_target_of_replicas_says_what_it_is_and_how_to_get_at_the_copies(tmp_path: Path) -> None:
    for run, steps in (("5f2a", (10, 20)), ("77b1", (10,))):
        for step in steps:
            checkpoint(tmp_path / "copies" / run, step)
    runs = r"5f2a \(2 checkpoints\), 77b1 \(1 checkpoint\)"
    with pytest.raises(UsageError, match=runs) as refused:
        inspection.find(tmp_path / "copies")
    assert "checkpoint.replicas" in refused.value.message
    assert f"autoglm ckpts {tmp_path}/copies/5f2a. To bring copies back" in refused.value.hint
    assert len(inspection.find(tmp_path / "copies" / "5f2a").paths) == 2


def test_a_bucket_is_not_looked_for_on_the_disk() -> None:
    with pytest.raises(UsageError, match=r"^s3://bucket/copies: expected a directory") as refused:
        inspection.find(Path("s3://bucket/copies"))
    assert "checkpoint.replicas" in refused.value.hint


def test_a_run_a_directory_and_a_checkpoint_are_all_understood(run: Path) -> None:
    for path in (run, run / "checkpoints", run / "checkpoints" / SECOND):
        found = look(path)
        assert found.facts.id == SECOND
        assert found.verdict.accepted
        assert [check.name for check in found.verdict.checks] == [
            "integrity",
            "world size",
            "model hash",
        ]
    assert inspection.find(run / "checkpoints" / SECOND).single
    assert [path.name for path in inspection.find(run).paths] == [SECOND, FIRST]


def test_the_tables_show_everything(run: Path) -> None:
    text = text_of(look(run))
    for part in (SECOND, "rank-00001.json", "model/weight", "8x8", "float32", "digest of model"):
        assert part in text
    assert f"{FIRST}  blake3:" in text


def test_the_chain_says_where_it_ends(run: Path) -> None:
    (link,) = look(run).chain
    assert (link.id, link.state) == (FIRST, "here")
    shutil.rmtree(run / "checkpoints" / FIRST)
    (link,) = look(run).chain
    assert link.state == "not here any more"


def test_a_parent_that_is_another_one_is_noticed(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / FIRST)
    made = checkpoint(run / "elsewhere", 10, lineage=("step-0000000001.a0",))
    shutil.copytree(made, run / "checkpoints" / FIRST)
    (link,) = look(run).chain
    assert link.state.startswith("another one with this id: blake3:")


def test_a_flipped_bit_fails_the_check_and_is_named(run: Path) -> None:
    flip(run / "checkpoints" / SECOND / "rank-00001.pack")
    found = look(run)
    assert not found.verdict.accepted
    text = text_of(found)
    assert "FAILED" in text
    assert "rank-00001.pack" in text


def test_a_manifest_that_cannot_be_read_is_a_verdict_and_not_an_error(run: Path) -> None:
    (run / "checkpoints" / SECOND / "manifest.json").write_text("{")
    found = look(run)
    assert not found.verdict.accepted
    assert "expected a JSON document" in text_of(found)


def test_without_a_run_beside_it_only_integrity_is_judged(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "checkpoints" / SECOND, tmp_path / "backup" / SECOND)
    found = look(copy)
    assert found.verdict.accepted
    assert "no run beside it to compare with" in text_of(found)


def test_another_model_than_the_run_has_fails_the_check(run: Path) -> None:
    other = Script().life().both("model", attempt=0, hash="blake3:" + "0" * 64, model=None)
    directory(run, other.save(0, 10).events)
    failed = [check.name for check in look(run).verdict.checks if not check.ok]
    assert failed == ["model hash"]


def test_a_checkpoint_in_quarantine_is_judged_by_its_run(run: Path) -> None:
    moved = Store(run / "checkpoints").quarantine(SECOND, "for a test")
    target = inspection.find(moved)
    assert target.run
    assert target.run.path == run


@pytest.mark.parametrize("what", ["nothing", "file", "directory"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    if what == "directory":
        path.mkdir()
    with pytest.raises(UsageError, match=what):
        inspection.find(path)


def test_verdicts_of_all_come_newest_first(run: Path) -> None:
    flip(run / "checkpoints" / FIRST / "rank-00000.pack")
    target = inspection.find(run)
    verdicts = inspection.verdicts(target, inspection.expectation(target.run))
    assert [(v.id, v.accepted) for v in verdicts] == [(SECOND, True), (FIRST, False)]
    assert inspection.exit_code(verdicts) == 1
    assert inspection.exit_code(verdicts[1:]) == 90
    assert inspection.exit_code(verdicts[:1]) == inspection.exit_code([]) == 0


def test_a_checkpoint_of_a_branch_that_was_given_up_is_not_broken(run: Path) -> None:
    with (run / "events.jsonl").open("ab") as journal:
        journal.write(encode(Branched(step=10, attempt=1)))
    target = inspection.find(run)
    verdicts = inspection.verdicts(target, inspection.expectation(target.run))
    assert [inspection.word(verdict) for verdict in verdicts] == ["given up", "ok"]
    assert inspection.exit_code(verdicts) == 0


def test_a_checkpoint_that_is_retired_meanwhile_is_no_damage(run: Path) -> None:
    target = inspection.find(run)
    shutil.rmtree(run / "checkpoints" / FIRST)
    assert [v.id for v in inspection.verdicts(target, None)] == [SECOND]


def test_the_json_form_can_be_compared_by_programs(run: Path) -> None:
    document = inspection.to_json(look(run), tensors=True)
    assert document["ok"]
    assert document["manifest"]["step"] == 20
    assert document["objects"]["model"].startswith("blake3:")
    assert {tensor["name"] for tensor in document["tensors"]} == {"model/weight", "model/bias"}
