"""The real replicator process, with real replicas that fail."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.storage.object_store import SEGMENT_BYTES
from autoglm_resume.checkpoint.storage.storage import open_storage
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import NoAcceptableCheckpoint, UsageError
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.fault_injector import flip_a_bit
from autoglm_resume.supervise.services import replicator
from autoglm_resume.supervise.services.replicator import Replicator, restore
from tests.lines import line
from tests.patience import PATIENCE, soon

RUN = "run"


class Watched:
    """The checkpoints of a run, the handle on its replicator, and what it told the journal."""

    def __init__(self, directory: Path, loop: EventLoop) -> None:
        self.store = Store(directory / "checkpoints")
        self.log = directory / "replicator.log"
        self.loop = loop
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.replicas: Replicator
        self._saver = PartWriter(self.store, SaveOptions(compress="off"))
        self._weight = torch.zeros(1)

    def start(self, *targets: str, policy: Any = "local") -> None:
        self.replicas = Replicator(
            self.loop,
            os.environ,
            self.store.root,
            RUN,
            targets,
            policy,
            self.log,
            lambda event: self.told.append(line(event)),
        )
        self.replicas.start()

    def save(self, step: int, numbers: int = 1000) -> str:
        """A checkpoint of `numbers` 4-byte numbers that are all new."""
        weight = torch.randn(numbers, generator=torch.Generator().manual_seed(step))
        taken = capture.take(
            {"model": {"w": weight}}, id=checkpoint_id(step, "a0"), rank=0, world_size=1
        )
        self._saver.persist(taken)
        return taken.id

    def heard(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.told if name == event]

    def wait_for(self, event: str, count: int = 1, **expected: Any) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [f for f in self.heard(event) if expected.items() <= f.items()]

        came = self.loop.wait(lambda: len(found()) >= count, soon())
        assert came, f"{event} {expected}: {self.told}\n{self.log.read_text()}"
        return found()[count - 1]

    def flush(self) -> bool:
        return self.replicas.flush(PATIENCE)


@pytest.fixture
def run(tmp_path: Path, loop: EventLoop) -> Iterator[Watched]:
    watched = Watched(tmp_path, loop)
    yield watched
    watched.replicas.close()
    assert not watched.replicas.pids


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "replica").mkdir()
    return tmp_path / "replica"


@pytest.fixture(params=["directory", "s3"])
def target(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return str(found if request.param == "directory" else found.url)


def same(store: Store, target: str) -> bool:
    """Whether the replica holds exactly the files of the store."""
    here = {
        str(path.relative_to(store.root)): path.stat().st_size
        for path in store.root.rglob("*")
        if path.is_file()
    }
    return open_storage(target, RUN).names() == here


def test_replicas_get_what_was_there_and_what_comes(run: Watched, target: str) -> None:
    first = run.save(10)
    run.start(target)
    said = run.wait_for("replicated", id=first, replica=target)
    assert said["bytes"] == sum(p.stat().st_size for p in run.store.directory(first).iterdir())
    second = run.save(20)
    run.replicas.notice()
    run.wait_for("replicated", id=second)
    assert run.flush()
    assert same(run.store, target)
    assert run.heard("replicas_flushed")[0]["behind"] == {}
    assert not run.heard("replica_behind")


def test_who_is_started_again_sends_nothing_twice(run: Watched, target: str) -> None:
    run.save(10)
    run.start(target)
    assert run.flush()
    run.replicas.close()
    run.start(target)
    assert run.flush()
    assert len(run.heard("replicated")) == 1


def test_what_retention_deletes_here_goes_there_when_something_newer_is_there(
    run: Watched, target: str
) -> None:
    first = run.save(10)
    run.start(target)
    assert run.flush()
    run.store.delete(first)
    assert run.flush()
    assert first in {name.partition("/")[0] for name in open_storage(target, RUN).names()}
    run.save(20)
    assert run.flush()
    assert same(run.store, target)


def test_a_checkpoint_counts_when_as_many_copies_are_there_as_the_job_asks(
    run: Watched, directory: Path, tmp_path: Path
) -> None:
    ids = [run.save(10)]
    missing = tmp_path / "missing"
    run.start(str(directory), str(missing), policy="all")
    assert not run.flush()
    assert not run.replicas.counts(ids[0])
    assert run.replicas.protected(ids) == frozenset()
    missing.mkdir()
    assert run.flush()
    assert run.replicas.counts(ids[0])
    missing.rename(tmp_path / "away")
    ids.append(run.save(20))
    assert not run.flush()
    assert not run.replicas.counts(ids[1])
    assert run.replicas.protected(ids) == {ids[0]}


def test_what_earlier_events_say_counts_before_a_replica_can_be_asked(
    loop: EventLoop, tmp_path: Path
) -> None:
    id = checkpoint_id(10, "a0")
    target = str(tmp_path / "missing")
    handle = Replicator(
        loop, {}, tmp_path, RUN, [target], "all", tmp_path / "log", print, {target: [id]}
    )
    assert handle.counts(id)


class TestTroubles:
    def test_an_upload_that_was_cut_off_goes_on_where_it_stopped(
        self, run: Watched, s3: Any
    ) -> None:
        id = run.save(10, numbers=SEGMENT_BYTES * 5 // 8)
        directory = s3.objects / RUN / id
        directory.mkdir(parents=True)

        def sent() -> dict[str, int]:
            """Inode by name: an object that is sent again gets another one."""
            found = directory.glob("rank-00000.pack.*-of-00003")
            return {path.name: path.stat().st_ino for path in found}

        s3.stop()
        s3.start("--bwlimit", "40M")
        changes = DirectoryWatch()
        changes.add(directory)
        run.loop.watch(changes, lambda: list(changes.changed()) and None)
        run.start(s3.url)
        assert run.loop.wait(lambda: bool(sent()), soon())
        s3.stop()
        before = sent()
        assert 0 < len(before) < 3
        assert run.wait_for("replica_behind", replica=s3.url)["behind"] == 1
        s3.start()
        said = run.wait_for("replicated", id=id)
        run.wait_for("replica_caught_up", replica=s3.url)
        assert same(run.store, s3.url)
        assert sent().items() > before.items(), "nothing was sent twice"
        whole = sum(path.stat().st_size for path in run.store.directory(id).iterdir())
        assert said["bytes"] == whole - len(before) * SEGMENT_BYTES
        assert len(run.heard("replica_behind")) == len(run.heard("replica_caught_up")) == 1

    def test_a_server_that_is_away_is_told_once_and_caught_up_with(
        self, run: Watched, s3: Any
    ) -> None:
        s3.stop()
        run.start(s3.url)
        ids = [run.save(step) for step in (10, 20, 30)]
        for _ in range(3):
            assert not run.flush()
        behind = [fields["behind"] for fields in run.heard("replicas_flushed")]
        assert all(list(each) == [s3.url] for each in behind)
        (said,) = run.heard("replica_behind")
        assert "Connection refused" in said["reason"]
        s3.start()
        run.wait_for("replica_caught_up")
        assert [fields["id"] for fields in run.heard("replicated")] == ids[::-1], "newest first"
        assert same(run.store, s3.url)

    def test_a_server_that_hangs_holds_up_nobody(
        self, run: Watched, s3: Any, directory: Path
    ) -> None:
        run.start(s3.url, str(directory))
        assert run.flush()
        s3.hang()
        for step in range(10, 60, 10):
            id = run.save(step)
            run.replicas.notice()
            run.wait_for("replicated", id=id, replica=str(directory))
        assert run.wait_for("replica_behind", replica=s3.url)["reason"].startswith("4 checkpoints")
        assert not run.replicas.flush(2.0)
        assert list(run.heard("replicas_flushed")[-1]["behind"]) == [s3.url]
        s3.resume()
        run.wait_for("replica_caught_up", replica=s3.url)
        assert run.flush()
        assert same(run.store, s3.url)
        assert len(run.heard("replica_behind")) == 1

    def test_a_read_only_place_is_told_once_and_caught_up_with(
        self, run: Watched, directory: Path, read_only: Callable[[Path], Callable[[], None]]
    ) -> None:
        undo = read_only(directory)
        run.save(10)
        run.start(str(directory))
        for _ in range(3):
            assert not run.flush()
        (said,) = run.heard("replica_behind")
        assert said["reason"].endswith("Read-only file system")
        undo()
        run.wait_for("replica_caught_up")
        assert same(run.store, str(directory))

    def test_damage_is_told_once_and_the_others_are_copied(
        self, run: Watched, directory: Path
    ) -> None:
        bad, good = run.save(10), run.save(20)
        flip_a_bit(run.store.directory(bad) / "rank-00000.pack")
        run.start(str(directory))
        assert run.flush()
        assert run.flush()
        assert [fields["id"] for fields in run.heard("replicated")] == [good]
        (said,) = run.heard("warning")
        assert bad in said["text"]

    def test_a_replicator_that_dies_is_started_again(
        self, run: Watched, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replicator, "RESTART_SECONDS", 0.01)
        run.start(str(directory))
        assert run.flush()
        (pid,) = run.replicas.pids
        os.kill(pid, signal.SIGKILL)
        assert "SIGKILL" in run.wait_for("warning")["text"]
        id = run.save(10)
        run.wait_for("replicated", id=id)
        assert run.replicas.pids.isdisjoint({pid})

    def test_it_dies_with_its_supervisor(self, tmp_path: Path, directory: Path) -> None:
        code = f"""
import os, pathlib
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.services.replicator import Replicator
root = pathlib.Path({str(tmp_path)!r})
handle = Replicator(
    EventLoop(), os.environ, root / "checkpoints", "run", [{str(directory)!r}], "local",
    root / "log", lambda event: None,
)
handle.start()
assert handle.flush(60)
print(*handle.pids, flush=True)
os.kill(os.getpid(), 9)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(int(done.stdout))
            assert select.select([fd], [], [], PATIENCE)[0], "it lives on"
            os.close(fd)

    def test_a_target_that_can_never_work_is_refused_before_anything_starts(
        self, loop: EventLoop, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=r"^relative: .* the path an absolute one"):
            Replicator(loop, {}, tmp_path, RUN, ["relative"], "local", tmp_path / "log", print)


class TestRepair:
    def test_a_flipped_bit_is_repaired_from_a_replica(self, run: Watched, target: str) -> None:
        id = run.save(10)
        run.start(target)
        assert run.flush()
        path = run.store.directory(id)
        digest = run.store.load_manifest(path).digest
        before = (path / "rank-00000.pack").read_bytes()
        flip_a_bit(path / "rank-00000.pack")
        assert not examine(run.store, path).integrity.ok
        assert run.replicas.repair(id, digest) == [f"{id}/rank-00000.pack"]
        assert examine(run.store, path).integrity.ok
        assert (path / "rank-00000.pack").read_bytes() == before
        (said,) = run.heard("repaired")
        assert (said["id"], said["files"]) == (id, [f"{id}/rank-00000.pack"])

    def test_a_checkpoint_of_which_there_is_no_good_copy_is_left_as_it_is(
        self, run: Watched, directory: Path
    ) -> None:
        id = run.save(10)
        flip_a_bit(run.store.directory(id) / "rank-00000.pack")
        run.start(str(directory))
        assert run.replicas.repair(id) == []
        (said,) = run.heard("repair_failed")
        assert "no replica has a good copy" in said["reason"]

    def test_what_is_not_damaged_is_not_repaired(self, run: Watched, directory: Path) -> None:
        id = run.save(10)
        run.start(str(directory))
        assert run.replicas.repair(id) == []
        (said,) = run.heard("repair_failed")
        assert said["reason"] == "every byte of it is as it was written"

    def test_a_stop_request_ends_the_wait(self, run: Watched, s3: Any) -> None:
        id = run.save(10)
        run.start(s3.url)
        assert run.flush()
        flip_a_bit(run.store.directory(id) / "rank-00000.pack")
        s3.hang()
        assert run.replicas.repair(id, stopped=lambda: True) == []
        (said,) = run.heard("repair_failed")
        assert said["reason"] == "no answer from the replicator"

    def test_without_replicas_there_is_nothing_to_do(self, run: Watched) -> None:
        id = run.save(10)
        run.start()
        run.replicas.notice()
        assert run.flush()
        assert run.replicas.repair(id) == []
        assert run.replicas.counts(id)
        assert run.told == []


class TestRestore:
    def test_a_lost_directory_comes_back(self, run: Watched, target: str, tmp_path: Path) -> None:
        run.save(10)
        newest = run.save(20)
        run.start(target)
        assert run.flush()
        root = tmp_path / "elsewhere" / "checkpoints"
        found = restore(os.environ, root, [target])
        assert found is not None
        assert (found.run, found.id) == (RUN, newest)
        assert examine(Store(root), root / newest).integrity.ok

    def test_nothing_to_restore_is_not_an_error_but_no_answer_is(
        self, tmp_path: Path, directory: Path
    ) -> None:
        run_of = restore(os.environ, tmp_path / "new", [str(directory)])
        assert run_of is None
        with pytest.raises(NoAcceptableCheckpoint, match="mount"):
            restore(os.environ, tmp_path / "new", [str(tmp_path / "nowhere")])
