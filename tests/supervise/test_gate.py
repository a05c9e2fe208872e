"""What a supervisor adds to the gate: its job, snapshots in memory, going back, and a journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import Branch, checkpoint_id
from autoglm_resume.checkpoint.format.structure import combined
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.errors import NoAcceptableCheckpoint
from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.core.history import History, Model, recall
from autoglm_resume.supervise.gate import RunGate
from tests.checkpoint.checkpoints import STRUCTURE, WIDTH, Checkpoints


class Run(Checkpoints):
    """The same of a job."""

    def gate(
        self,
        world_size: int = 2,
        guards: dict[str, str] | None = None,
        checkpoint: dict[str, Any] | None = None,
        past: History | None = None,
    ) -> RunGate:
        job = Job.model_validate(
            {
                "name": "run",
                "script": str(self.directory / "train.py"),
                "workdir": str(self.directory),
                "run_dir": str(self.directory),
                "checkpoint": {"dir": str(self.root), **(checkpoint or {})},
                "guards": guards or {},
            }
        )
        return RunGate(job, world_size, self.tell, past or History())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def sealed(step: int, model: str | None = None, ranks: int = 2) -> Sealed:
    seals = tuple(f"seal {rank}" for rank in range(ranks))
    return Sealed(checkpoint_id(step, "a0"), 0.0, model, 1000, seals)


def test_what_is_only_in_memory_yet_is_taken_if_it_is_the_newest(run: Run) -> None:
    run.save(10)
    point = run.gate().pass_gate(sealed(20))
    assert point is not None
    assert (point.step, point.digest, point.seals) == (20, "", ("seal 0", "seal 1"))
    (gate,) = run.events("gate")
    assert "sealed in memory" in gate["verdicts"][0]["reason"]
    assert json.dumps(gate)
    run.save(30)
    point = run.gate().pass_gate(sealed(20))
    assert point is not None
    assert (point.step, point.seals) == (30, ())


def test_what_has_been_written_since_is_taken_from_storage(run: Run) -> None:
    id = run.save(20)
    point = run.gate().pass_gate(sealed(20))
    assert point is not None
    assert (point.id, point.seals) == (id, ())
    assert point.digest


def test_what_is_only_in_memory_must_fit_too(run: Run) -> None:
    old = run.save(10)
    gate = run.gate()
    gate.expect_model(Model(STRUCTURE.hash, STRUCTURE))
    point = gate.pass_gate(sealed(20, model=STRUCTURE.hash))
    assert point is not None
    assert point.seals
    for other in (sealed(20, model="blake3:" + 64 * "0"), sealed(20, STRUCTURE.hash, ranks=3)):
        point = gate.pass_gate(other)
        assert point is not None
        assert point.id == old


def test_what_is_being_written_is_not_swept_away(run: Run) -> None:
    run.save(10)
    half, other = run.save(20, only=0), run.save(15, only=0)
    gate = run.gate()
    gate.pass_gate(sealed(20))
    gate.clean()
    assert run.store.directory(half).exists()
    assert not run.store.directory(other).exists()


def test_a_snapshot_that_ranks_could_not_read_is_not_said_to_be_damaged_on_storage(
    run: Run,
) -> None:
    gate = run.gate()
    point = gate.pass_gate(sealed(20))
    assert point is not None
    assert gate.may_take_from_memory(point.id)
    gate.not_loaded(point, "another seal")
    assert not gate.may_take_from_memory(point.id)
    id = run.save(20)
    point = gate.pass_gate()
    assert point is not None
    assert point.id == id
    gate.not_loaded(point, "a flipped bit")
    (verdict,) = gate.judge().verdicts
    assert "a flipped bit" in verdict.reason


def test_going_back_takes_an_older_one_and_leaves_the_newer_ones_where_they_are(run: Run) -> None:
    old = run.save(10)
    run.damage(run.save(20))
    run.save(30)
    newest = run.save(40)
    gate = run.gate()

    def taken() -> tuple[str, int]:
        point = gate.pass_gate()
        assert point is not None
        return point.id, gate.checkpointed

    assert taken()[0] == newest
    gate.go_back(None, 1)
    assert gate.branches == ((30, 1),)
    assert taken()[1] == 30
    gate.go_back(30, 2)
    assert taken() == (old, 10), "that of step 20 is damaged"
    assert run.store.directory(newest).is_dir()
    assert [e["step"] for e in run.events("branched")] == [30, 10]


def test_where_there_is_nothing_older_going_back_changes_nothing(run: Run) -> None:
    only = run.save(10)
    gate = run.gate()
    before = run.listing()
    gate.go_back(None, 1)
    gate.go_back(10, 1)
    assert (gate.branches, run.listing()) == ((), before)
    assert len(run.events("warning")) == 2
    point = gate.pass_gate()
    assert point is not None
    assert point.id == only


def test_another_model_is_refused_naming_the_parameter(run: Run) -> None:
    run.save(10)
    gate = run.gate()
    mine = capture.structure_of({"model.w": torch.zeros(WIDTH, 8)})
    gate.expect_model(Model(combined([mine.hash, mine.hash]), mine))
    with pytest.raises(NoAcceptableCheckpoint, match=r"model\.w") as caught:
        gate.pass_gate()
    assert f"[{WIDTH}, {WIDTH}]" in caught.value.message
    assert f"[{WIDTH}, 8]" in caught.value.message
    assert "go back to the model" in caught.value.hint
    relaxed = run.gate(guards={"model": "off"})
    relaxed.expect_model(Model(combined([mine.hash, mine.hash]), mine))
    assert relaxed.pass_gate() is not None


def test_the_model_that_made_them_passes(run: Run) -> None:
    run.save(10)
    gate = run.gate()
    gate.expect_model(Model(combined([STRUCTURE.hash, STRUCTURE.hash]), STRUCTURE))
    assert gate.pass_gate() is not None


def test_another_world_size_passes_where_the_job_allows_it(run: Run) -> None:
    id = run.save(10, ranks=3)
    point = run.gate(guards={"world_size": "off"}).pass_gate()
    assert point is not None
    assert point.id == id


def test_another_world_size_is_resharded_where_the_job_says_elastic(run: Run) -> None:
    id = run.save(10, ranks=4)
    point = run.gate(guards={"world_size": "elastic"}).pass_gate()
    assert point is not None
    assert point.id == id
    assert "4 ranks in the checkpoint, 2 now: resharded" in run.told[0][1]["verdicts"][0]["reason"]


@pytest.mark.parametrize("how", [{"rename": {"w": "v"}}, {"strict": False}])
def test_another_model_passes_where_the_job_renames_or_takes_what_fits(
    run: Run, how: dict[str, Any]
) -> None:
    run.save(10)
    renamed = capture.structure_of({"model.v": torch.zeros(WIDTH, WIDTH)})
    gate = run.gate(checkpoint=how)
    gate.expect_model(Model(renamed.hash, renamed))
    assert gate.pass_gate() is not None


def test_the_newest_that_would_be_taken_can_be_asked(run: Run) -> None:
    gate = run.gate()
    assert gate.newest() is None
    id = run.save(10)
    run.damage(run.save(20))
    newest = gate.newest()
    assert newest is not None
    assert newest.id == id
    assert run.events("quarantined") == []


def test_a_commit_that_nobody_lived_to_report_is_reported_by_the_gate(run: Run) -> None:
    run.save(10)
    gate = run.gate()
    assert gate.pass_gate() is not None
    (committed,) = run.events("committed")
    assert committed["step"] == 10
    assert committed["objects"]
    assert gate.pass_gate() is not None
    assert len(run.events("committed")) == 1
    id = run.save(20)
    assert gate.notice(id, 20)
    assert not gate.notice(id, 20), "every rank may say so"
    assert gate.pass_gate() is not None
    assert len(run.events("committed")) == 1, "a rank reported that one"


def test_what_a_branch_left_behind_is_not_present(run: Run) -> None:
    kept, _ = run.save(10), run.save(20)
    assert run.gate(past=History(branches=(Branch(10, 1),))).present() == [kept]


@pytest.mark.parametrize(
    ("ranks", "hint"), [(3, "nproc_per_node"), (2, "go back to the model")], ids=["ranks", "model"]
)
def test_where_nothing_is_acceptable_the_hints_speak_of_the_job(
    run: Run, ranks: int, hint: str
) -> None:
    run.save(10, ranks=ranks)
    gate = run.gate()
    gate.expect_model(Model("blake3:" + 64 * "0", None))
    with pytest.raises(NoAcceptableCheckpoint) as caught:
        gate.pass_gate()
    assert hint in caught.value.hint
    assert "--fresh" in caught.value.hint


def test_a_checkpoint_that_ranks_told_of_is_missed_when_it_vanished(run: Run) -> None:
    gate = run.gate(past=History(checkpointed=10))
    gate.reached(30)
    gate.reached(20)
    with pytest.raises(NoAcceptableCheckpoint, match="checkpoint of step 30 or an older one"):
        gate.pass_gate()


def test_what_the_journal_has_is_not_announced_by_another_life(run: Run) -> None:
    id = run.save(10)
    told = [events.Committed(id=id, step=10)]
    assert run.gate(past=recall(told)).pass_gate() is not None
    assert run.events("committed") == []
    told.append(events.Quarantined(id=id, step=10))
    assert run.gate(past=recall(told)).pass_gate() is not None, "a person put it back"
    assert len(run.events("committed")) == 1
