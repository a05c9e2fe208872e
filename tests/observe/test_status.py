from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_resume.observe import status
from autoglm_resume.protocol.heartbeats import Board, Phase
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import Script, directory, killed_once


@pytest.fixture
def board() -> Iterator[tuple[Board, str]]:
    made, fd = Board.create(2)
    yield made, f"/proc/{os.getpid()}/fd/{fd}"
    made.close()
    os.close(fd)


def test_a_run_that_nobody_has_is_what_its_journal_says(tmp_path: Path) -> None:
    found = status.of(RunDirectory(directory(tmp_path / "demo", killed_once().events)))
    assert (found.holder, found.ranks) == (None, ())
    assert (found.summary.state, found.step) == ("finished", 10)


def test_a_living_run_shows_the_last_beat_of_every_rank(
    tmp_path: Path, board: tuple[Board, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(directory(tmp_path / "demo", Script().life().attempt(0).events))
    pulse = board[0].pulse(1)
    pulse.report(loss=2.5, grad_norm=None)
    pulse.completed(41)
    pulse.phase(Phase.BACKWARD)
    with run.locked() as lock:
        lock.describe(board[1])
        found = status.of(run)
        status.show(found)
    assert found.holder
    assert found.holder.pid == os.getpid()
    assert found.step == 41
    silent, busy = found.ranks
    assert (silent.step, silent.age) == (-1, None)
    assert (busy.step, busy.phase, busy.loss) == (41, "in backward", 2.5)
    assert busy.age is not None
    assert busy.age < 10
    assert "in backward" in capsys.readouterr().out
    assert status.to_json(found)["ranks"][1]["step"] == 41


def test_the_slurm_job_of_the_present_life_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script().life()
    script.say("slurm", job="12_3", restarts=1, node="n1")
    found = status.of(RunDirectory(directory(tmp_path / "demo", script.events)))
    status.show(found)
    assert "job 12_3 on n1, requeued 1 time" in capsys.readouterr().out
    assert status.to_json(found)["slurm"] == {"job": "12_3", "restarts": 1, "node": "n1"}
    elsewhere = directory(tmp_path / "later", script.life().events)
    assert status.to_json(status.of(RunDirectory(elsewhere)))["slurm"] is None


def test_replicas_say_how_far_behind_they_are_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = killed_once()
    copied = "step-0000000004.a0"
    script.say("replicated", replica="/nfs/copies", id=copied)
    script.say("replica_behind", replica="/nfs/copies", behind=2, reason="No space left on device")
    away = {"checkpoint": {"replicas": ["/nfs/copies", "s3://bucket/copies"]}}
    found = status.of(RunDirectory(directory(tmp_path / "demo", script.events, **away)))
    near, far = found.replicas
    assert (near.newest, near.behind, near.error) == (copied, 2, "No space left on device")
    assert (far.newest, far.behind, far.error, far.since) == (None, 3, "", None)
    status.show(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"/nfs/copies {copied} 2 checkpoints No space left on device" in lines
    assert status.to_json(found)["replicas"][1]["behind"] == 3


def test_a_run_without_replicas_does_not_speak_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.show(status.of(RunDirectory(directory(tmp_path / "demo", killed_once().events))))
    assert "newest there" not in capsys.readouterr().out


@pytest.mark.parametrize("path", ["", "/proc/1/fd/999999", "/dev/null"])
def test_a_board_that_cannot_be_read_leaves_the_ranks_out(tmp_path: Path, path: str) -> None:
    run = RunDirectory(directory(tmp_path / "demo", Script().life().events))
    with run.locked() as lock:
        lock.describe(path)
        assert status.of(run).ranks == ()


def test_several_runs_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("one", "two")
    runs = [RunDirectory(directory(tmp_path / name, killed_once().events)) for name in names]
    status.show_all([status.of(run) for run in runs])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "one", "two"]
    assert "64.5%" in lines[1]


def test_a_line_says_why_a_run_neither_trains_nor_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Script().life().attempt(0).fails(0, 7, kind="hang")
    failed.say("run_failed", code=1, reason="it died 3 times in a row")
    scripts = {"good": killed_once(), "bad": failed, "gone": Script().life().attempt(0).save(0, 4)}
    runs = [RunDirectory(directory(tmp_path / n, s.events)) for n, s in scripts.items()]
    status.show_all([status.of(run) for run in runs])
    head, good, bad, gone = capsys.readouterr().out.splitlines()
    assert head.endswith("reason")
    assert good.endswith("64.5%")
    assert bad.split()[1] == "failed"
    assert "hang" in bad
    assert bad.endswith("it died 3 times in a row")
    assert gone.endswith("its supervisor died; `autoglm resume` continues from step 4")


def test_the_last_failure_is_told_with_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.show(status.of(RunDirectory(directory(tmp_path / "demo", killed_once().events))))
    text = capsys.readouterr().out
    assert "1, 1 of them ordered by drills; the last: killed, rank 1 died by SIGKILL" in text
