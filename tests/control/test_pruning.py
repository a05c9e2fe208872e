from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import journal
from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.retention import KeepBest, KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.control import pruning
from autoglm_resume.errors import RunLocked, UsageError
from autoglm_resume.events import Pruned, Replicated, RunCompleted, SupervisorStarted
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.observe import inspection, listing
from autoglm_resume.observe.pure.goodput import summarize
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import checkpoint, directory, killed_once

_CONTEXT = multiprocessing.get_context("fork")


def id_of(step: int) -> str:
    return f"step-{step:010d}.a0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with checkpoints of steps 10 to 40, of which 30 refers to 20."""
    path = tmp_path / "demo"
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.0), (40, 2.5)):
        lineage = (id_of(step - 10),) if step > 10 else ()
        metrics = {"loss": loss}
        checkpoint(path / "checkpoints", step, lineage=lineage, refer=step == 30, metrics=metrics)
    return directory(path, [e for e in killed_once().events if e.event not in ("model", "gate")])


def prune(path: Path, keep: KeepRules) -> list[int]:
    """The steps that are left."""
    pruning.prune(inspection.find_all(path), keep)
    return [int(path.name[5:15]) for path in Store(path / "checkpoints").committed()]


def test_what_no_rule_keeps_is_deleted_and_the_rest_is_whole(run: Path) -> None:
    assert prune(run, KeepRules(last=1, best=KeepBest("loss", 1))) == [40, 30, 20]
    store = Store(run / "checkpoints")
    assert all(facts.integrity.ok for facts in candidates(store, deep=True))
    assert prune(run, KeepRules(last=1)) == [40]


def test_the_best_of_the_job_stays_unless_another_best_is_asked_for(run: Path) -> None:
    job = json.loads((run / "job.json").read_text())
    job["checkpoint"]["keep"] = {"last": 3, "best": {"metric": "loss", "mode": "max"}}
    (run / "job.json").write_text(json.dumps(job))
    target = inspection.find_all(run)
    assert pruning.rules(target) == KeepRules(last=3, best=KeepBest("loss", 1, "max"))
    named = KeepRules(last=1, best=KeepBest("loss", 1))
    assert pruning.rules(target, named) == named
    assert prune(run, pruning.rules(target, KeepRules(last=1))) == [40, 10]


def test_what_was_deleted_is_in_the_journal_and_changes_no_figure(run: Path) -> None:
    before = summarize(RunDirectory(run).events())
    prune(run, KeepRules(last=1))
    told = RunDirectory(run).events()
    pruned = [e.id for e in told if isinstance(e, Pruned)]
    assert pruned == [id_of(30), id_of(20), id_of(10)]
    assert summarize(told) == before


def test_a_machine_that_was_restarted_since_changes_no_figure_either(run: Path) -> None:
    told = journal.read(run / "events.jsonl")
    end = told[-1].time or 0.0
    later = [
        SupervisorStarted(time=end + 50, mono=1.0, boot_id="2"),
        RunCompleted(time=end + 60, mono=11.0, step=10),
    ]
    pruned = Pruned(time=end + 40, id=id_of(10))
    assert summarize([*told, pruned, *later]).down == summarize([*told, *later]).down == 50.0


def replicated_to(run: Path, **ids: int) -> None:
    """Let the journal say that replicas have checkpoints up to these steps."""
    with (run / "events.jsonl").open("ab") as file:
        for target, newest in ids.items():
            for step in range(10, newest + 1, 10):
                file.write(journal.encode(Replicated(id=id_of(step), replica=f"/{target}")))


def set_checkpoint(run: Path, **fields: Any) -> None:
    document = json.loads((run / "job.json").read_text())
    document["checkpoint"] = {**(document.get("checkpoint") or {}), **fields}
    (run / "job.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("commit", "left"), [("all", [40, 20]), ("quorum", [40, 30, 20]), ("local", [40])]
)
def test_the_newest_that_counts_as_committed_stays(run: Path, commit: str, left: list[int]) -> None:
    set_checkpoint(run, commit=commit, replicas=["/a", "/b"])
    replicated_to(run, a=30, b=20)
    assert prune(run, KeepRules(last=1)) == left


def test_what_protected_it_is_said_and_ends_when_the_replicas_have_caught_up(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_checkpoint(run, commit="all", replicas=["/a"])
    replicated_to(run, a=20)
    pruning.show(listing.of(inspection.find_all(run), KeepRules(last=1), 0.0), dry=True)
    words = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert words[3].endswith("stays the newest that counts (commit: all)")
    replicated_to(run, a=40)
    assert prune(run, KeepRules(last=1)) == [40]


def test_nothing_is_deleted_while_a_supervisor_has_the_run(run: Path) -> None:
    # A lock belongs to who opened the file, so this very process is as good as another.
    with RunDirectory(run).locked(), pytest.raises(RunLocked):
        prune(run, KeepRules(last=1))
    assert len(Store(run / "checkpoints").committed()) == 4


def test_nothing_is_deleted_while_a_supervisor_has_the_directory(run: Path) -> None:
    alone = run.parent / "alone"
    shutil.copytree(run / "checkpoints", alone)
    with locked_checkpoints(alone), pytest.raises(RunLocked):
        pruning.prune(inspection.find_all(alone), KeepRules(last=1))
    pruning.prune(inspection.find_all(alone), KeepRules(last=1))
    assert [path.name for path in Store(alone).committed()] == [id_of(40)]


def test_a_directory_without_a_run_needs_to_be_told_what_to_keep(run: Path) -> None:
    alone = run.parent / "alone"
    shutil.copytree(run / "checkpoints", alone)
    with pytest.raises(UsageError, match="no run beside these checkpoints") as refused:
        pruning.rules(inspection.find_all(alone))
    assert f"autoglm prune {alone} --keep 3" in refused.value.hint
    assert pruning.rules(inspection.find_all(run)) == KeepRules()


def test_a_dry_run_tells_what_would_go_and_why_the_rest_stays(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = KeepRules(last=1, best=KeepBest("loss", 1))
    pruning.show(listing.of(inspection.find_all(run), keep, 0.0), dry=True)
    out = capsys.readouterr().out.splitlines()
    words = [" ".join(line.split()) for line in out]
    assert words[1].startswith(f"{id_of(40)} 40 ")
    assert words[1].endswith("stays the newest")
    assert words[2].endswith("stays best loss 2")
    assert words[3].endswith(f"stays needed by {id_of(30)}")
    assert words[4].endswith("would go no rule keeps it")
    assert words[5].startswith("1 checkpoint would be deleted, ")
