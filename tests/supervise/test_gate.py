from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.structure import combined
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.checkpoint.write.part_writer import Saver
from autoglm_resume.errors import NoAcceptableCheckpoint
from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.core.history import Model
from autoglm_resume.supervise.gate import Gatekeeper
from autoglm_resume.supervise.ranks.fault_injector import flip_a_bit

WIDTH = 32
STRUCTURE = capture.structure_of({"model.w": torch.zeros(WIDTH, WIDTH)})


class Run:
    """A job's gatekeeper, its checkpoints, and what it told the journal."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkpoints"
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.directory = directory
        self.store = Store(self.root)

    def keeper(
        self,
        world_size: int = 2,
        guards: dict[str, str] | None = None,
        checkpoint: dict[str, Any] | None = None,
    ) -> Gatekeeper:
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
        return Gatekeeper(job, world_size, lambda event, **f: self.told.append((event, f)))

    def save(self, step: int, ranks: int = 2, only: int | None = None) -> str:
        for rank in range(ranks) if only is None else [only]:
            weight = torch.randn(
                WIDTH, WIDTH, generator=torch.Generator().manual_seed(step * 100 + rank)
            )
            taken = capture.take(
                {"model": {"w": weight}},
                id=checkpoint_id(step, "a0"),
                rank=rank,
                world_size=ranks,
                lineage=(checkpoint_id(step - 10, "a0"),),
                model=STRUCTURE,
            )
            Saver(self.store, share=False).persist(taken)
        return taken.id

    def damage(self, id: str) -> None:
        # flip_a_bit keeps the times as a bad disk would, except the ctime.
        flip_a_bit(self.store.directory(id) / "rank-00001.pack")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.told if event == name]

    def listing(self) -> dict[str, bytes | None]:
        """Every file with its content, every directory."""
        return {
            str(path.relative_to(self.directory)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.directory.rglob("*"))
        }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_with_no_checkpoint_at_all_a_run_starts_from_step_0(run: Run) -> None:
    assert run.keeper().pass_gate() is None
    (gate,) = run.events("gate")
    assert (gate["accepted"], gate["step"], gate["verdicts"]) == (None, 0, [])
    assert not run.root.exists(), "judging makes nothing"


def sealed(step: int, model: str | None = None, ranks: int = 2) -> Sealed:
    seals = tuple(f"seal {rank}" for rank in range(ranks))
    return Sealed(checkpoint_id(step, "a0"), 0.0, model, 1000, seals)


def test_what_is_only_in_memory_yet_is_taken_if_it_is_the_newest(run: Run) -> None:
    run.save(10)
    point = run.keeper().pass_gate(sealed(20))
    assert point is not None
    assert (point.step, point.digest, point.seals) == (20, "", ("seal 0", "seal 1"))
    (gate,) = run.events("gate")
    assert "sealed in memory" in gate["verdicts"][0]["reason"]
    assert json.dumps(gate)
    run.save(30)
    point = run.keeper().pass_gate(sealed(20))
    assert point is not None
    assert (point.step, point.seals) == (30, ())


def test_what_has_been_written_since_is_taken_from_storage(run: Run) -> None:
    id = run.save(20)
    point = run.keeper().pass_gate(sealed(20))
    assert point is not None
    assert (point.id, point.seals) == (id, ())
    assert point.digest


def test_what_is_only_in_memory_must_fit_too(run: Run) -> None:
    old = run.save(10)
    keeper = run.keeper()
    keeper.model = Model(STRUCTURE.hash, STRUCTURE)
    point = keeper.pass_gate(sealed(20, model=STRUCTURE.hash))
    assert point is not None
    assert point.seals
    for other in (sealed(20, model="blake3:" + 64 * "0"), sealed(20, STRUCTURE.hash, ranks=3)):
        point = keeper.pass_gate(other)
        assert point is not None
        assert point.id == old


def test_what_is_being_written_is_not_swept_away(run: Run) -> None:
    run.save(10)
    half, other = run.save(20, only=0), run.save(15, only=0)
    keeper = run.keeper()
    keeper.pass_gate(sealed(20))
    keeper.clean()
    assert run.store.directory(half).exists()
    assert not run.store.directory(other).exists()


def test_a_snapshot_that_ranks_could_not_read_is_not_said_to_be_damaged_on_storage(
    run: Run,
) -> None:
    keeper = run.keeper()
    point = keeper.pass_gate(sealed(20))
    assert point is not None
    assert keeper.may_take_from_memory(point.id)
    keeper.refuse(point, "another seal")
    assert not keeper.may_take_from_memory(point.id)
    id = run.save(20)
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == id
    keeper.refuse(point, "a flipped bit")
    assert keeper.refused == {id: "a flipped bit"}


def test_the_newest_one_is_taken(run: Run) -> None:
    run.save(10)
    newest = run.save(20)
    point = run.keeper().pass_gate()
    assert point is not None
    assert (point.id, point.step) == (newest, 20)
    assert point.digest == run.store.load_manifest(run.store.directory(newest)).digest
    (gate,) = run.events("gate")
    assert (gate["accepted"], len(gate["verdicts"])) == (newest, 1)
    assert json.dumps(gate)


def test_a_damaged_one_goes_to_quarantine_and_the_older_one_is_taken(run: Run) -> None:
    old, broken = run.save(10), run.save(20)
    run.damage(broken)
    point = run.keeper().pass_gate()
    assert point is not None
    assert point.id == old
    (put_away,) = run.events("quarantined")
    assert (put_away["id"], put_away["step"]) == (broken, 20)
    assert "rank-00001.pack" in put_away["reason"]
    assert [path.name for path in run.store.quarantined()] == [broken]
    assert run.store.latest() == run.store.directory(old)
    again = run.keeper().pass_gate()
    assert again == point


def test_going_back_takes_an_older_one_and_leaves_the_newer_ones_where_they_are(run: Run) -> None:
    old = run.save(10)
    run.damage(run.save(20))
    run.save(30)
    newest = run.save(40)
    keeper = run.keeper()

    def taken() -> tuple[str, int]:
        point = keeper.pass_gate()
        assert point is not None
        return point.id, keeper.checkpointed

    assert taken()[0] == newest
    keeper.go_back(None, 1)
    assert keeper.branches == ((30, 1),)
    assert taken()[1] == 30
    keeper.go_back(30, 2)
    assert taken() == (old, 10), "that of step 20 is damaged"
    assert run.store.directory(newest).is_dir()
    assert [e["step"] for e in run.events("branched")] == [30, 10]


def test_where_there_is_nothing_older_going_back_changes_nothing(run: Run) -> None:
    only = run.save(10)
    keeper = run.keeper()
    before = run.listing()
    keeper.go_back(None, 1)
    keeper.go_back(10, 1)
    assert (keeper.branches, run.listing()) == ((), before)
    assert len(run.events("warning")) == 2
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == only


def test_one_that_only_does_not_fit_is_passed_over_and_left_alone(run: Run) -> None:
    old = run.save(10, ranks=2)
    other = run.save(20, ranks=3)
    point = run.keeper().pass_gate()
    assert point is not None
    assert point.id == old
    assert run.events("quarantined") == []
    assert run.store.directory(other).is_dir()
    assert "world size: expected 2, found 3" in run.events("gate")[0]["verdicts"][0]["reason"]


def test_what_a_rank_refused_is_not_taken_again(run: Run) -> None:
    old, refused = run.save(10), run.save(20)
    keeper = run.keeper()
    keeper.refused[refused] = "rank 1: chunk 3"
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == old
    assert "rank 1: chunk 3" in run.events("quarantined")[0]["reason"]


def all_damaged(run: Run) -> None:
    run.damage(run.save(10))
    run.damage(run.save(20))


def all_of_another_world(run: Run) -> None:
    run.save(10, ranks=3)


def damaged_and_other(run: Run) -> None:
    run.save(10, ranks=3)
    run.damage(run.save(20))


@pytest.mark.parametrize(
    ("prepare", "says", "hints"),
    [
        (all_damaged, "rank-00001.pack", "restore the damaged files from a copy"),
        (all_of_another_world, "world size: expected 2, found 3", "nproc_per_node"),
        (damaged_and_other, "world size: expected 2, found 3", "restore the damaged files"),
    ],
)
def test_with_only_unacceptable_ones_nothing_is_changed(
    run: Run, prepare: Callable[[Run], None], says: str, hints: str
) -> None:
    prepare(run)
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint) as caught:
        run.keeper().pass_gate()
    assert caught.value.exit_code == 90
    assert run.listing() == before
    for path in run.store.committed():
        assert path.name in caught.value.message
    assert says in caught.value.message
    assert hints in caught.value.hint
    assert "--fresh" in caught.value.hint
    assert run.events("gate")[0]["accepted"] is None


def test_nothing_is_changed_even_where_a_commit_was_left_undone(run: Run) -> None:
    run.save(10, ranks=3)
    id = run.save(20, ranks=3)
    (run.store.directory(id) / "manifest.json").unlink()
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint):
        run.keeper().pass_gate()
    assert run.listing() == before


def test_a_whole_checkpoint_that_lacks_only_its_manifest_is_never_deleted(run: Run) -> None:
    id = run.save(10, ranks=3)
    (run.store.directory(id) / "manifest.json").unlink()
    before = run.listing()
    keeper = run.keeper()
    try:
        keeper.pass_gate()
    except NoAcceptableCheckpoint:
        assert run.listing() == before
    keeper.clean()
    assert set(before) <= set(run.listing())


def test_another_model_is_refused_naming_the_parameter(run: Run) -> None:
    run.save(10)
    keeper = run.keeper()
    mine = capture.structure_of({"model.w": torch.zeros(WIDTH, 8)})
    keeper.model = Model(combined([mine.hash, mine.hash]), mine)
    with pytest.raises(NoAcceptableCheckpoint, match=r"model\.w") as caught:
        keeper.pass_gate()
    assert f"[{WIDTH}, {WIDTH}]" in caught.value.message
    assert f"[{WIDTH}, 8]" in caught.value.message
    assert "go back to the model" in caught.value.hint
    relaxed = run.keeper(guards={"model": "off"})
    relaxed.model = keeper.model
    assert relaxed.pass_gate() is not None


def test_the_model_that_made_them_passes(run: Run) -> None:
    run.save(10)
    keeper = run.keeper()
    keeper.model = Model(combined([STRUCTURE.hash, STRUCTURE.hash]), STRUCTURE)
    assert keeper.pass_gate() is not None


def test_another_world_size_passes_where_the_job_allows_it(run: Run) -> None:
    id = run.save(10, ranks=3)
    point = run.keeper(guards={"world_size": "off"}).pass_gate()
    assert point is not None
    assert point.id == id


def test_another_world_size_is_resharded_where_the_job_says_elastic(run: Run) -> None:
    id = run.save(10, ranks=4)
    point = run.keeper(guards={"world_size": "elastic"}).pass_gate()
    assert point is not None
    assert point.id == id
    assert "4 ranks in the checkpoint, 2 now: resharded" in run.told[0][1]["verdicts"][0]["reason"]


@pytest.mark.parametrize("how", [{"rename": {"w": "v"}}, {"strict": False}])
def test_another_model_passes_where_the_job_renames_or_takes_what_fits(
    run: Run, how: dict[str, Any]
) -> None:
    run.save(10)
    renamed = capture.structure_of({"model.v": torch.zeros(WIDTH, WIDTH)})
    keeper = run.keeper(checkpoint=how)
    keeper.model = Model(renamed.hash, renamed)
    assert keeper.pass_gate() is not None


def test_checkpoints_that_vanished_are_missed(run: Run) -> None:
    keeper = run.keeper()
    keeper.checkpointed = 30
    with pytest.raises(NoAcceptableCheckpoint, match="checkpoint of step 30 or an older one") as e:
        keeper.pass_gate()
    assert "mounted" in e.value.hint


def test_a_run_whose_only_checkpoints_are_in_quarantine_does_not_begin_again(run: Run) -> None:
    id = run.save(10)
    run.store.quarantine(id, "by hand")
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint):
        run.keeper().pass_gate()
    assert run.listing() == before


def test_a_commit_that_a_crash_left_undone_is_done_and_told(run: Run) -> None:
    run.save(10)
    id = run.save(20)
    (run.store.directory(id) / "manifest.json").unlink()
    keeper = run.keeper()
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == id
    (committed,) = run.events("committed")
    assert (committed["id"], committed["step"]) == (id, 20)
    assert committed["digest"] == point.digest
    assert keeper.checkpointed == 20


def test_a_checkpoint_that_lacks_a_part_is_not_taken_and_removed_only_later(run: Run) -> None:
    old = run.save(10)
    half = run.save(20, only=0)
    keeper = run.keeper()
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == old
    assert run.store.directory(half).is_dir(), "nothing is removed before the ranks have run a step"
    fresh = run.save(30, only=0)
    keeper.clean()
    assert not run.store.directory(half).exists()
    assert run.store.directory(fresh).is_dir(), "it was not there when the gate was passed"
    assert run.store.directory(old).is_dir()


def test_judging_changes_nothing_and_can_judge_all(run: Run) -> None:
    run.save(10)
    run.damage(run.save(20))
    before = run.listing()
    choice = run.keeper().judge(every=True)
    assert [verdict.accepted for verdict in choice.verdicts] == [False, True]
    assert choice.accepted is not None
    assert choice.accepted.step == 10
    assert run.listing() == before
    assert run.told == []


def test_the_newest_that_would_be_taken_can_be_asked(run: Run) -> None:
    keeper = run.keeper()
    assert keeper.newest() is None
    id = run.save(10)
    run.damage(run.save(20))
    newest = keeper.newest()
    assert newest is not None
    assert newest.id == id
    assert run.events("quarantined") == []


def test_a_commit_that_nobody_lived_to_report_is_reported_by_the_gate(run: Run) -> None:
    run.save(10)
    keeper = run.keeper()
    assert keeper.pass_gate() is not None
    (committed,) = run.events("committed")
    assert committed["step"] == 10
    assert committed["objects"]
    assert keeper.pass_gate() is not None
    assert len(run.events("committed")) == 1
    id = run.save(20)
    assert keeper.notice(id, 20)
    assert not keeper.notice(id, 20), "every rank may say so"
    assert keeper.pass_gate() is not None
    assert len(run.events("committed")) == 1, "a rank reported that one"


def test_what_a_branch_left_behind_is_not_present(run: Run) -> None:
    kept, _ = run.save(10), run.save(20)
    keeper = run.keeper()
    keeper.branches = ((10, 1),)
    assert keeper.present() == [kept]
