"""Bad input and bad luck: a clear message, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from autoglm_resume import locks
from tests.faults.conftest import Rehearsal, fill
from tests.patience import PATIENCE
from tests.thorough import thorough


def test_a_script_that_never_works_is_given_up_early_with_1(rehearsal: Rehearsal) -> None:
    finished = rehearsal.run("--fail", "always")
    assert finished.code == 1
    assert "this script never works" in finished.err
    assert len(rehearsal.events("attempt_started")) == 3
    assert "Traceback" in rehearsal.events("failure")[0]["traceback"]


def test_a_rank_that_exits_93_ends_the_run_with_93(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("--fail", "ninety-three").code == 93
    assert len(rehearsal.events("attempt_started")) == 1


def test_another_model_is_refused_with_90_naming_the_parameter_and_changing_nothing(
    rehearsal: Rehearsal,
) -> None:
    assert rehearsal.run("--steps", "10").code == 0
    before = _tree(rehearsal.checkpoints)
    (rehearsal.run_dir / "events.jsonl").unlink()  # a new run that finds these checkpoints
    finished = rehearsal.run("--steps", "20", "--width", "96")
    assert finished.code == 90, finished
    assert "[64, 32] float32" in finished.err
    assert "[96, 32] float32" in finished.err
    assert _tree(rehearsal.checkpoints) == before


def test_another_world_size_is_refused_with_90_naming_both(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("--steps", "10").code == 0
    before = _tree(rehearsal.checkpoints)
    (rehearsal.run_dir / "events.jsonl").unlink()
    finished = rehearsal.run("--steps", "20", nproc_per_node=1)
    assert finished.code == 90
    assert "world size: expected 1, found 2" in finished.err
    assert not rehearsal.events("attempt_started")
    assert _tree(rehearsal.checkpoints) == before


def test_a_script_that_tracks_more_than_the_checkpoints_hold_exits_90_and_keeps_them(
    interrupted: Rehearsal,
) -> None:
    before = _tree(interrupted.checkpoints)
    finished = interrupted.run("--fail", "track-more")
    assert finished.code == 90, finished
    assert "this script also tracks another" in finished.err
    assert _tree(interrupted.checkpoints) == before


@pytest.mark.parametrize("damage", ["flip", *thorough("delete", "newer")])
def test_damage_to_the_newest_checkpoint_falls_back_to_the_one_before(
    interrupted: Rehearsal, undisturbed: dict[str, str], damage: str
) -> None:
    newest, older = sorted(interrupted.checkpoints.glob("step-*"), reverse=True)[:2]
    _damage(newest, damage)
    resumed = interrupted.resume()
    assert resumed.code == 0, resumed
    gate = [e for e in interrupted.events("gate") if len(e["verdicts"]) > 1][-1]
    assert gate["accepted"] == older.name
    assert not gate["verdicts"][0]["accepted"]
    assert (interrupted.checkpoints / "quarantine" / newest.name).exists() == (damage != "newer")
    assert interrupted.final() == undisturbed


def test_with_every_checkpoint_damaged_it_exits_90_and_changes_nothing(
    interrupted: Rehearsal,
) -> None:
    for path in interrupted.checkpoints.glob("step-*"):
        _damage(path, "flip")
    before = _tree(interrupted.checkpoints)
    resumed = interrupted.resume()
    assert resumed.code == 90
    assert "rank-00000.pack" in resumed.err
    assert "hint" in resumed.err
    assert _tree(interrupted.checkpoints) == before


def test_checkpoints_that_are_gone_are_missed_rather_than_started_over(
    interrupted: Rehearsal,
) -> None:
    interrupted.checkpoints.rename(interrupted.directory / "unmounted")
    resumed = interrupted.resume()
    assert resumed.code == 90
    assert "is the file system mounted" in resumed.err


def test_a_fixed_port_that_is_taken_is_named_with_its_owner(rehearsal: Rehearsal) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finished = rehearsal.run(env={"MASTER_PORT": port})
    assert finished.code == 2
    assert f"expected port {port} to be free" in finished.err
    assert f"process {os.getpid()}" in finished.err


def test_a_checkpoint_directory_that_is_a_file_is_refused_before_anything_starts(
    rehearsal: Rehearsal,
) -> None:
    (rehearsal.directory / "file").write_text("")
    finished = rehearsal.run(checkpoint={"dir": "file"})
    assert finished.code == 2
    assert str(rehearsal.directory / "file") in finished.err


def test_a_full_disk_fails_saves_but_neither_training_nor_the_older_checkpoint(
    rehearsal: Rehearsal, small_disk: Path, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(
        hold=("0:0:20", "0:0:39"),
        checkpoint={
            "dir": str(small_disk / "ckpt"),
            "every": {"steps": 5},
            "keep": 2,
            "on_busy": "wait",
        },
    )
    rehearsal.wait_for("committed", lambda e: e["step"] == 10)
    hog = fill(small_disk)
    rehearsal.release(20)
    failed = rehearsal.wait_for("save_failed")
    assert "No space left" in failed["reason"]
    committed = sorted((small_disk / "ckpt").glob("step-*/manifest.json"))
    assert len(committed) >= 2
    hog.unlink()
    rehearsal.release(39)
    assert process.wait(PATIENCE) == 0
    assert len(rehearsal.events("attempt_started")) == 1
    assert rehearsal.final() == undisturbed


def _damage(checkpoint: Path, how: str) -> None:
    pack = checkpoint / "rank-00000.pack"
    manifest = checkpoint / "manifest.json"
    match how:
        case "flip":
            data = bytearray(pack.read_bytes())
            data[len(data) // 3] ^= 1
            pack.write_bytes(data)
        case "delete":
            pack.unlink()
        case "newer":
            document = json.loads(manifest.read_text())
            document["format"] += 1
            manifest.write_text(json.dumps(document))


def _tree(directory: Path) -> dict[str, bytes]:
    """All but the lock, which says who had it last."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != locks.CHECKPOINTS
    }
