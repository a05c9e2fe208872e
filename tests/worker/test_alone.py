"""The gate that a script passes by itself, alone and under plain torchrun."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.replicas import mirror
from autoglm_resume.checkpoint.storage.storage import open_storage
from autoglm_resume.errors import NoAcceptableCheckpoint, UsageError
from autoglm_resume.savers.directory_lock import persisting
from autoglm_resume.worker import alone
from autoglm_resume.worker.base.settings import Settings, unsupervised
from tests.checkpoint.checkpoints import STRUCTURE, Checkpoints
from tests.worker.alone import end_process, lonely
from tests.worker.test_run_beside import write_run

STARTED = {"event": "run_started", "run_id": "abc"}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with lonely(tmp_path):
        yield Checkpoints(tmp_path)


def passed(run: Checkpoints, **changes: Any) -> Settings:
    settings = unsupervised(str(run.root), None, None, 3)
    return alone.agreed(replace(settings, **changes), STRUCTURE)


def id_of(settings: Settings) -> str | None:
    return settings.resume.id if settings.resume else None


def test_a_damaged_one_goes_to_quarantine_and_the_older_one_is_taken(
    run: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    old, broken = run.save(10, ranks=1), run.save(20, ranks=1)
    run.damage(broken, rank=0)
    assert id_of(passed(run)) == old
    assert [path.name for path in run.store.quarantined()] == [broken]
    said = capfd.readouterr().err
    assert re.search(rf"autoglm: {broken} was moved to quarantine, rejected: .*00000\.pack", said)
    assert f"going on from step 10, checkpoint {old}" in said
    assert id_of(passed(run)) == old
    said = capfd.readouterr().err
    assert said.count("\n") == 1, "that is said once"
    assert f"going on from step 10, checkpoint {old}, made 20" in said, "and this always"


def test_with_only_damaged_ones_nothing_is_changed(run: Checkpoints) -> None:
    run.damage(run.save(10, ranks=1), rank=0)
    run.save(20, ranks=2, only=0)
    before = run.listing()
    with pytest.raises(NoAcceptableCheckpoint, match="nothing was changed") as caught:
        passed(run)
    assert caught.value.hint == (
        f"restore the damaged files from a copy; or move {run.root} away to start from step 0"
    )
    assert run.listing() == before


def test_a_commit_that_a_crash_left_undone_is_done(run: Checkpoints) -> None:
    run.save(10, ranks=1)
    newest = run.save(20, ranks=1)
    (run.store.directory(newest) / "manifest.json").unlink()
    assert id_of(passed(run)) == newest


def test_of_a_branch_that_was_given_up_nothing_is_resumed(
    run: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    kept, left = run.save(10, ranks=1), run.save(20, ranks=1)
    story = [STARTED, {"event": "branched", "attempt": 1, "step": 10}]
    write_run(run.directory, run.root, story)
    first = passed(run)
    assert id_of(first) == kept
    assert first.checkpoint.branches == ((10, 1),), "retention must know them too"
    said = capfd.readouterr().err
    assert f"{left} is left where it is, rejected: branch: expected the run's present one" in said
    assert run.store.directory(left).is_dir()
    own = run.save(20, ranks=1, token=first.token)
    again = passed(run)
    assert id_of(again) == own, "what it saved itself is of the present branch"
    assert again.token != first.token
    write_run(run.directory, run.root, [*story, {"event": "branched", "attempt": 2, "step": 10}])
    assert id_of(passed(run)) == kept, "which may be given up in turn"


def test_a_run_whose_checkpoints_vanished_is_not_begun_again(run: Checkpoints) -> None:
    committed = {"event": "committed", "id": "step-0000000030.a0", "step": 30}
    write_run(run.directory, run.root, [STARTED, committed])
    with pytest.raises(NoAcceptableCheckpoint, match="checkpoint of step 30 or an older one"):
        passed(run)


def test_what_a_replica_has_is_repaired_rather_than_passed_over(
    run: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    run.save(10, ranks=1)
    newest = run.save(20, ranks=1)
    target = str(run.directory / "replica")
    Path(target).mkdir()
    here = mirror.committed(run.store, {})
    mirror.replicate(run.store, newest, here, {}, open_storage(target, "abc"))
    write_run(run.directory, run.root, [STARTED], replicas=[target])
    run.damage(newest, rank=0)
    assert id_of(passed(run)) == newest
    said = capfd.readouterr().err
    assert f"{newest} was damaged; replaced from a replica: {newest}/rank-00000.pack" in said
    (Path(target) / "abc" / newest / "rank-00000.pack").unlink()
    run.damage(newest, rank=0)
    assert id_of(passed(run)) == run.store.committed()[-1].name
    assert "no replica could repair it" in capfd.readouterr().err


def test_a_copy_of_a_script_is_not_taken_for_one_that_was_moved(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = (run.directory / name / "train.py" for name in "ab")
    for script in (first, copy):
        script.parent.mkdir()
        script.write_text("import config")

    def resumed(script: Path) -> int:
        monkeypatch.setattr(sys, "argv", [str(script)])
        session = autoglm.init(every_steps=2)
        session.track(model=torch.nn.Linear(1, 1))
        try:
            return session.resume()
        finally:
            end_process()

    monkeypatch.setattr(sys, "argv", [str(first)])
    session = autoglm.init()
    session.track(model=torch.nn.Linear(1, 1))
    assert list(session.steps(2)) == [0, 1]
    end_process()
    with pytest.raises(UsageError, match=f"script: {first} then, {copy} now"):
        resumed(copy)
    link = run.directory / "train.py"
    link.symlink_to(first)
    assert resumed(link) == 2
    first.unlink()
    assert resumed(copy) == 2, "it was moved there"


def test_one_that_is_started_while_another_saves_waits_for_it(run: Checkpoints) -> None:
    run.save(10, ranks=1)
    script = f"""
from pathlib import Path
from autoglm_resume.worker import alone
from autoglm_resume.worker.base.settings import unsupervised
print(alone.agreed(unsupervised({str(run.root)!r}, None, None, 3), None).resume.step)
"""
    with persisting(run.root):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert "waiting for the last process's save" in process.stderr.readline()
        run.save(20, ranks=1)
        run.damage(run.save(30, ranks=1), rank=0)
    out, error = process.communicate()
    assert out == "20\n"
    assert error.count("was moved to quarantine") == 1


SCRIPT = """
import sys
import torch
import autoglm_resume as autoglm

if sys.argv[1] == "with a group":
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
session = autoglm.init(checkpoint_dir="checkpoints", every_steps=10)
model = torch.nn.Module()
model.w = torch.nn.Parameter(torch.zeros(32, 32))
session.track(model=model)
start = session.resume()
print(f"rank {session.rank} starts from {start}", flush=True)
"""


@pytest.mark.parametrize("group", ["with a group", "without one"])
def test_under_torchrun_one_rank_passes_the_gate_for_all(run: Checkpoints, group: str) -> None:
    (run.directory / "train.py").write_text(SCRIPT)
    run.save(10)
    run.damage(run.save(20))
    left = run.save(15, only=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
    done = subprocess.run([*command, group], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    starts = sorted(re.findall(r"rank \d starts from \d+", done.stdout))
    assert starts == ["rank 0 starts from 10", "rank 1 starts from 10"]
    assert done.stderr.count("was moved to quarantine") == 1
    assert len(run.store.quarantined()) == 1
    assert not run.store.directory(left).exists(), "what was left half done is removed"


def test_under_torchrun_all_ranks_are_refused_alike(run: Checkpoints) -> None:
    (run.directory / "train.py").write_text(SCRIPT)
    run.damage(run.save(20))
    before = run.listing()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
    done = subprocess.run([*command, "without one"], capture_output=True, text=True)
    assert done.returncode
    assert "nothing was changed" in done.stderr
    assert run.listing() == before
