from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.supervise import storage_wait
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.group import children
from autoglm_resume.supervise.storage_wait import StorageWait


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_wait, "EVERY", 0.01)


def never() -> bool:
    return False


def test_where_there_is_room_nobody_waits(loop: EventLoop, tmp_path: Path) -> None:
    told: list[str] = []
    assert StorageWait(loop, [tmp_path, tmp_path], never).wait(1, 60, told.append) == ""
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_waited_for_until_it_has_room(
    loop: EventLoop, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(256)
    hog = disk / "hog"
    hog.write_bytes(bytes(256 * 1024))
    told: list[str] = []

    def tell(problem: str) -> None:
        told.append(problem)
        hog.unlink()

    assert StorageWait(loop, [disk], never).wait(100_000, 60, tell) == ""
    assert told == [f"{disk}: 0 bytes are free, 100,000 are needed"]


def test_a_directory_without_inodes_or_that_is_away_has_a_problem_too(
    loop: EventLoop, tmp_path: Path
) -> None:
    told: list[str] = []
    away = tmp_path / "unmounted"
    problem = StorageWait(loop, [tmp_path, away], never).wait(0, 0, told.append)
    assert problem == f"{away}: No such file or directory"
    assert told == [problem]
    assert not away.exists()


def test_storage_that_does_not_answer_holds_nobody_up(
    loop: EventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_wait, "PATIENCE", 0.0)
    watch = StorageWait(loop, [tmp_path], never)
    assert watch.look(0) == f"{tmp_path}: does not answer"
    monkeypatch.setattr(storage_wait, "PATIENCE", 60.0)
    assert watch.wait(0, 60, lambda _: None) == ""


def test_a_stop_ends_the_wait_at_once(loop: EventLoop, tmp_path: Path) -> None:
    stops: list[str] = []
    watch = StorageWait(loop, [tmp_path / "away"], lambda: bool(stops))
    assert watch.wait(0, 1e6, stops.append)
    assert stops


def test_storage_that_was_given_no_time_to_answer_is_not_said_to_be_silent(
    loop: EventLoop, tmp_path: Path
) -> None:
    told: list[str] = []
    assert (
        StorageWait(loop, [tmp_path], lambda: True).wait(0, 60, told.append)
        == storage_wait.ENDED_EARLY
    )
    assert told == []


def test_no_look_is_left_behind(loop: EventLoop, tmp_path: Path) -> None:
    before = children()
    StorageWait(loop, [tmp_path], never).look(0)
    assert children() <= before
