from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from autoglm_resume.events import Branched
from autoglm_resume.journal import encode
from autoglm_resume.observe import inspection, listing
from autoglm_resume.observe.listing import Listed, Listing
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import WALL, Script, checkpoint, directory, flip

HOUR = 3600.0
NOW = WALL + 3 * HOUR


def id_of(step: int, token: str = "a0") -> str:
    return f"step-{step:010d}.{token}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20, 30, of which 30 refers to 20, and a branch 40 and 50 off step 10."""
    path = tmp_path_factory.mktemp("pristine") / "demo"
    root = path / "checkpoints"
    made = checkpoint(root, 10, created=WALL, metrics={"loss": 2.5})
    checkpoint(root, 20, lineage=(id_of(10),), created=WALL, metrics={"loss": 2.31})
    checkpoint(root, 30, lineage=(id_of(20), id_of(10)), created=WALL + HOUR, refer=True)
    checkpoint(root, 40, token="a1", lineage=(id_of(10),), created=NOW - 60)
    checkpoint(root, 50, token="a1", lineage=(id_of(40, "a1"), id_of(10)), created=NOW - 3)
    model = Store(root).load_manifest(made).model_hash
    run = Script().life().gate(10).attempt(0).both("model", attempt=0, hash=model, model=None)
    return directory(path, run.events)


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    copy = shutil.copytree(pristine, tmp_path / "demo")
    document = (copy / "job.json").read_text().replace(str(pristine), str(copy))
    (copy / "job.json").write_text(document)
    return copy


def of(path: Path, keep: KeepRules | None = None, *, pruning: bool = False) -> Listing:
    return listing.of(inspection.find_all(path), keep, NOW, pruning=pruning)


def by_step(found: Listing) -> dict[int, Listed]:
    return {each.facts.step: each for each in found.checkpoints}


def why(found: Listing) -> dict[int, tuple[str, ...] | None]:
    return {each.facts.step: each.kept for each in found.checkpoints}


def text_of(found: Listing) -> list[str]:
    return [line for table in listing.tables(found) for line in table.lines()]


def test_all_checkpoints_are_listed_newest_first_whichever_is_named(run: Path) -> None:
    for path in (run, run / "checkpoints", run / "checkpoints" / id_of(20)):
        assert [each.facts.step for each in of(path).checkpoints] == [50, 40, 30, 20, 10]


def test_each_says_why_it_stays(run: Path) -> None:
    assert why(of(run, KeepRules(last=1))) == {
        50: ("the newest",),
        40: (),
        30: (),
        20: (),
        10: ("accepted last",),
    }
    assert why(of(run, KeepRules(last=1, every_steps=30)))[20] == (f"needed by {id_of(30)}",)
    assert [each.facts.step for each in of(run, KeepRules(last=1)).doomed] == [40, 30, 20]


def test_without_rules_nothing_is_said_about_staying(run: Path) -> None:
    found = of(run)
    assert set(why(found).values()) == {None}
    assert found.doomed == []


def test_what_was_saved_on_another_branch_is_marked(run: Path) -> None:
    assert [step for step, each in by_step(of(run)).items() if each.branch] == [30, 20]


def test_what_is_older_than_the_known_chain_may_belong_to_it(run: Path) -> None:
    for step, token in ((40, "a1"), (10, "a0")):
        shutil.rmtree(run / "checkpoints" / id_of(step, token))
    found = of(run)
    assert not by_step(found)[50].parent_here
    checkpoint(run / "checkpoints", 5)
    assert [step for step, each in by_step(of(run)).items() if each.branch] == [30, 20]


def test_a_damaged_one_is_left_alone_and_pushes_out_no_other(run: Path) -> None:
    flip(run / "checkpoints" / id_of(50, "a1") / "rank-00001.pack")
    found = of(run, KeepRules(last=1))
    assert why(found)[50] is None
    assert why(found)[40] == ("the newest",)
    (row,) = [line for line in text_of(found) if line.startswith(id_of(50, "a1"))]
    assert "left alone: not acceptable" in row
    assert "FAILED: integrity: " in row


def test_an_unreadable_manifest_leaves_the_sizes_blank(run: Path) -> None:
    (run / "checkpoints" / id_of(50, "a1") / "manifest.json").write_text("{")
    found = of(run, KeepRules())
    assert listing.to_json(found)["checkpoints"][0]["stored"] is None
    assert "FAILED" in text_of(found)[1]


def test_who_needs_whom_is_shown_and_what_is_gone(run: Path) -> None:
    root = run / "checkpoints"
    checkpoint(root, 60, lineage=(id_of(50, "a1"),), refer=True)
    (row,) = [line for line in text_of(of(run, KeepRules())) if line.startswith(id_of(60))]
    assert "50.a1" in row
    shutil.rmtree(root / id_of(50, "a1"))
    found = of(run, KeepRules())
    (row,) = [line for line in text_of(found) if line.startswith(id_of(60))]
    assert "50.a1 (gone)" in row
    assert f"it shares packs of {id_of(50, 'a1')}, not there any more: put back what" in row
    assert listing.to_json(found)["checkpoints"][0]["lacking"] == [id_of(50, "a1")]


def test_a_branch_that_was_given_up_may_go_and_pushes_out_nothing(run: Path) -> None:
    with (run / "events.jsonl").open("ab") as journal:
        journal.write(encode(Branched(step=10, attempt=2)))
    checkpoint(run / "checkpoints", 20, token="a2", lineage=(id_of(10),))
    found = of(run, KeepRules(last=2), pruning=True)
    assert [(each.facts.id, each.kept) for each in found.checkpoints] == [
        (id_of(50, "a1"), ()),
        (id_of(40, "a1"), ()),
        (id_of(30), ()),
        (id_of(20, "a2"), ("one of the last 2",)),
        (id_of(20), ()),
        (id_of(10), ("one of the last 2", "accepted last")),
    ]
    assert text_of(found)[1].split()[-5:] == ["branch", "may", "go", "given", "up"]
    assert [each.facts.step for each in found.doomed] == [50, 40, 30, 20]
    assert of(run, KeepRules(last=2)).doomed == [], "but not by itself"


def test_what_a_newer_version_wrote_may_need_all_that_is_older(run: Path) -> None:
    manifest = run / "checkpoints" / id_of(30) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": ', '"format": 9'))
    needed = f"needed by {id_of(30)}"
    assert why(of(run, KeepRules(last=1))) == {
        50: ("the newest",),
        40: (),
        30: None,
        20: (needed,),
        10: ("accepted last",),
    }


def test_what_one_that_does_not_fit_refers_to_stays(run: Path) -> None:
    root = run / "checkpoints"
    checkpoint(root, 60, ranks=1, lineage=(id_of(20),), refer=True)
    found = of(run, KeepRules(last=1))
    assert why(found)[60] is None
    assert why(found)[20] == (f"needed by {id_of(60)}",)
    (root / id_of(60) / "manifest.json").unlink()  # it may yet be committed
    assert why(of(run, KeepRules(last=1)))[20] == (f"needed by {id_of(60)}",)


def test_checkpoints_of_other_ranks_are_good_to_an_elastic_run(run: Path) -> None:
    checkpoint(run / "checkpoints", 60, ranks=1)
    assert not by_step(of(run))[60].verdict.accepted
    job = json.loads((run / "job.json").read_text())
    (run / "job.json").write_text(json.dumps(job | {"guards": {"world_size": "elastic"}}))
    found = by_step(of(run))[60]
    assert [check.ok for check in found.verdict.checks if check.name == "world size"] == [True]


def test_the_table_shows_sizes_chain_and_metrics(run: Path) -> None:
    lines = text_of(of(run, KeepRules(last=1)))
    assert lines[0].split() == [
        *("checkpoint", "step", "age", "ranks", "raw", "stored", "shared"),
        *("needs", "parent", "metrics", "why", "kept", "verdict"),
    ]
    newest, _, third, second, first = lines[1:]
    assert newest.split()[:4] == [id_of(50, "a1"), "50", "3.00", "s"]
    assert " 40.a1 " in newest
    assert newest.split()[-3:] == ["the", "newest", "ok"]
    assert " 20.a0, branch " in third
    assert "2h 00m" in third
    assert "loss 2.31" in second
    assert "accepted last" in first


def test_a_narrow_terminal_gets_two_tables_that_fit(run: Path) -> None:
    found = of(run, KeepRules(last=1))
    sizes, reasons = listing.tables(found, 80)
    assert sizes.fits(80)
    assert reasons.fits(80)
    assert {*sizes.headers, *reasons.headers} == {*listing.tables(found)[0].headers}
    assert len(listing.tables(found, 200)) == 1


def test_a_parent_that_is_gone_is_said_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / id_of(40, "a1"))
    assert " 40.a1 (gone) " in text_of(of(run))[1]


def test_what_is_in_quarantine_is_told_with_its_reason(run: Path) -> None:
    store = Store(run / "checkpoints")
    store.quarantine(id_of(50, "a1"), "a bit flipped")
    moved = store.quarantine(id_of(40, "a1"), "gone bad")
    (moved / "reason.json").write_text("[")
    found = of(run, KeepRules())
    assert found.quarantined == (
        (id_of(40, "a1"), "no reason was recorded"),
        (id_of(50, "a1"), "a bit flipped"),
    )
    assert text_of(found)[-1] == f"{id_of(50, 'a1')}  a bit flipped"


def test_the_json_form_has_everything(run: Path) -> None:
    document = json.loads(json.dumps(listing.to_json(of(run, KeepRules(last=1)))))
    assert document["directory"] == str(run / "checkpoints")
    assert document["keep"]["last"] == 1
    rows: dict[int, Any] = {row["step"]: row for row in document["checkpoints"]}
    assert rows[30]["needs"] == [id_of(20)]
    assert rows[30]["shared"] > 0 == rows[20]["shared"]
    assert rows[30]["kept"] == []
    assert rows[50]["parent"] == id_of(40, "a1")
    assert rows[50]["age"] == pytest.approx(3.0)
    assert rows[20]["metrics"] == {"loss": 2.31}
    assert rows[10]["verdict"].startswith("accepted: ")


def test_the_rules_are_those_of_the_run(run: Path) -> None:
    job = json.loads((run / "job.json").read_text())
    assert listing.keep_of(RunDirectory(run)) == KeepRules()
    job["checkpoint"]["keep"] = {"last": 2, "every_steps": None, "best": None, "for": "1h"}
    (run / "job.json").write_text(json.dumps(job))
    assert listing.keep_of(RunDirectory(run)) == KeepRules(last=2, for_seconds=3600.0)
    job["checkpoint"]["keep"] = "all"
    (run / "job.json").write_text(json.dumps(job))
    with pytest.raises(UsageError, match=r"job\.json: checkpoint\.keep: expected"):
        listing.keep_of(RunDirectory(run))
    assert listing.keep_of(None) is None
