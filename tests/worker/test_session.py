"""The session alone: no supervisor, one process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import (
    CheckpointError,
    CorruptCheckpoint,
    NoAcceptableCheckpoint,
    UsageError,
)
from tests.patience import PATIENCE
from tests.worker.alone import checkpoints, end_process, lonely


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Training:
    """A model, an optimizer, a scheduler and data, all of which a session tracks."""

    def __init__(self, width: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        self.sampler = autoglm.ResumableSampler(30, 4, endless=True)
        self.seen: list[list[int]] = []
        self.session = autoglm.init(**{"checkpoint_dir": "ckpt", "every_steps": 4, **options})
        self.session.track(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            sampler=self.sampler,
        )

    def step(self, batch: list[int]) -> torch.Tensor:
        self.seen.append(batch)
        x = torch.tensor(batch).float()[:, None] / 30 + torch.randn(len(batch), 4)
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def run(self, total: int, die_at: int | None = None) -> None:
        start = self.session.resume()
        data = iter(self.sampler)
        assert start == self.session.step
        for step in self.session.steps(total):
            if step == die_at:
                raise RuntimeError("died")
            self.session.report(loss=self.step(next(data)))

    def state(self) -> dict[str, Any]:
        return {
            "model": {k: v.tolist() for k, v in self.model.state_dict().items()},
            "momentum": [s["momentum_buffer"].tolist() for s in self.optimizer.state.values()],
            "lr": self.scheduler.get_last_lr(),
            "data": self.sampler.state_dict(),
            "random": torch.rand(3).tolist(),
        }


def steps_saved() -> list[int]:
    return [step_of(name) for name in checkpoints()]


def step_of(name: str) -> int:
    return int(name.split(".")[0].removeprefix("step-"))


def steps_kept(last: int) -> list[int]:
    """The newest `last`, after a look that the others are those that these need."""
    store, names = Store(Path("ckpt")), checkpoints()
    kept = names[-last:]
    needed = {id for name in kept for id in store.load_manifest(store.directory(name)).needs}
    assert set(names) == needed | set(kept)
    return [step_of(name) for name in kept]


def test_a_run_that_dies_and_resumes_ends_exactly_like_one_that_did_not() -> None:
    undisturbed = Training(checkpoint_dir="other")
    undisturbed.run(14)
    expected = undisturbed.state()
    for die_at in (6, 11, 12):
        training = Training()
        with pytest.raises(RuntimeError, match="died"):
            training.run(14, die_at)
        end_process()
    last = Training()
    last.run(14)
    assert last.session.step == 14
    assert last.state() == expected
    assert last.seen == undisturbed.seen[12:]


def test_it_saves_as_often_as_asked_and_at_the_end() -> None:
    Training(keep=20, every_steps=1).run(7)
    assert steps_saved() == [1, 2, 3, 4, 5, 6, 7], "no save is left out without a supervisor"


def test_it_keeps_the_newest_and_what_they_need() -> None:
    Training(keep=2).run(10)
    assert steps_kept(2) == [8, 10]
    before = checkpoints()
    finished = Training(keep=2)
    finished.run(10)
    assert finished.seen == [], "a finished run has nothing left to do"
    assert checkpoints() == before
    Training(keep=2).run(11)
    assert steps_kept(2) == [10, 11]


def test_a_loop_of_ones_own_has_the_same_verbs() -> None:
    training = Training(every_steps=2)
    assert training.session.resume() == 0
    assert training.session.resume() == 0
    training.step([1])
    training.session.step_done(0, loss=1.5, grad_norm=torch.tensor(2.0))
    assert steps_saved() == []
    training.session.step_done(1)
    assert steps_saved() == [2]
    again = Training(every_steps=2)
    assert again.session.resume() == 2
    assert again.session.step == 2


@pytest.mark.parametrize("verb", ["save", "step_done"])
def test_nothing_is_saved_or_counted_before_resume(verb: str) -> None:
    session = autoglm.init()
    with pytest.raises(UsageError, match=r"call session\.resume\(\) before"):
        session.save() if verb == "save" else session.step_done(0)


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), ValueError("x")])
def test_however_a_script_leaves_the_loop_it_leaves_as_itself_and_saves_nothing_more(
    end: BaseException,
) -> None:
    training = Training(every_steps=2)

    def train() -> None:
        for step in training.session.steps(10):
            if step == 3:
                raise end
            training.step([1])

    with pytest.raises(type(end)) as caught:
        train()
    assert caught.value is end
    assert steps_saved() == [2]


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        ({"rng": torch.nn.Linear(1, 1)}, "that name is taken"),
        ({"model": torch.nn.Linear(1, 1)}, "that name is taken"),
        ({"thing": object()}, "object has no state_dict"),
        ({"number": 3}, "int has no state_dict"),
    ],
)
def test_what_cannot_be_tracked_is_refused_by_name(objects: dict[str, Any], says: str) -> None:
    training = Training()
    with pytest.raises(UsageError, match=says) as caught:
        training.session.track(**objects)
    assert next(iter(objects)) in caught.value.message


def test_tracking_too_late_is_refused() -> None:
    training = Training()
    training.session.resume()
    with pytest.raises(UsageError, match="must come before"):
        training.session.track(late=torch.nn.Linear(1, 1))


def test_a_wrapped_model_is_the_same_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    Training().run(5)

    class Wrapped(torch.nn.Module):
        """As torch.compile makes it."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    again = Training()
    session = autoglm.init(checkpoint_dir="ckpt")
    session.track(model=Wrapped(again.model), optimizer=again.optimizer)
    session.track(scheduler=again.scheduler, sampler=again.sampler)
    assert session.resume() == 5


def other_model() -> tuple[Training, dict[str, Any]]:
    Training().run(5)
    other = Training(width=6)
    return other, {k: v.clone() for k, v in other.model.state_dict().items()}


def test_another_model_is_refused_and_nothing_is_changed() -> None:
    other, before = other_model()
    files = {p: p.read_bytes() for p in Path("ckpt").rglob("*") if p.is_file()}
    with pytest.raises(NoAcceptableCheckpoint, match="model hash") as caught:
        other.session.resume()
    assert caught.value.exit_code == 90
    assert "move" in caught.value.hint
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())
    assert other.optimizer.state_dict()["state"] == {}
    assert {p: p.read_bytes() for p in Path("ckpt").rglob("*") if p.is_file()} == files


def test_another_model_is_refused_naming_the_parameter() -> None:
    other, _ = other_model()
    with pytest.raises(NoAcceptableCheckpoint, match=r"model\.0\.weight: \[4, 4\]"):
        other.session.resume()


def test_a_new_tracked_object_is_missed_in_an_old_checkpoint() -> None:
    Training().run(5)
    again = Training()
    again.session.track(extra=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1))
    before = [p.clone() for p in again.model.parameters()]
    with pytest.raises(CheckpointError, match="also tracks extra") as caught:
        again.session.resume()
    assert not isinstance(caught.value, CorruptCheckpoint), "it is whole, and stays where it is"
    assert all(torch.equal(a, b) for a, b in zip(before, again.model.parameters(), strict=True))


def test_a_damaged_checkpoint_is_passed_over_for_the_older_one() -> None:
    Training().run(8)
    newest = Path("ckpt") / checkpoints()[-1]
    pack = next(newest.glob("*.pack"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    assert Training().session.resume() == 4


def test_a_save_that_fails_is_reported_at_a_later_one_and_training_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    training = Training(every_steps=2)
    session = training.session
    session.resume()
    for step in range(2):
        session.step_done(step)
    blocked = Path("ckpt/step-0000000004")
    session.step_done(2)
    token = checkpoints()[0].split(".")[1]
    blocked.with_name(f"{blocked.name}.{token}").write_text("a file is in the way")
    session.step_done(3)
    session.step_done(4)
    session.step_done(5)
    assert session.save()
    assert "training goes on" in capfd.readouterr().err
    assert steps_saved() == [2, 6, 6]


def test_numbers_of_all_kinds_can_be_reported() -> None:
    session = autoglm.init()
    session.report(loss=torch.tensor([0.5], requires_grad=True), grad_norm=2)
    session.report(loss=math.nan)
    session.report()
    session.report(accuracy=1, perplexity=torch.tensor(3))
    for figures in ({"loss": torch.ones(2)}, {"accuracy": "high"}, {"": 1.0}, {"x" * 101: 1.0}):
        with pytest.raises(UsageError, match="expected a"):
            session.report(**figures)


def test_by_default_checkpoints_lie_beside_the_work_under_the_scripts_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_me.py"])
    session = autoglm.init()
    session.resume()
    assert session.save()
    end_process()
    assert (Path.cwd() / "checkpoints" / "train_me").is_dir()


def test_a_model_is_still_copied_after_it_is_tracked() -> None:
    import copy

    training = Training()
    twin = copy.deepcopy(training.model)
    twin(torch.ones(4)).sum().backward()


def test_a_model_can_still_be_saved_whole_after_it_is_tracked(tmp_path: Path) -> None:
    training = Training()
    torch.save(training.model, tmp_path / "model.pt")


def test_evaluation_does_not_beat_as_training() -> None:
    from autoglm_resume.protocol.heartbeats import Board, Phase
    from autoglm_resume.worker.hooks import watch

    board, fd = Board.create(1)
    pulse = board.pulse(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passes: list[None] = []
    watch(model, pulse, lambda: passes.append(None))
    watch(optimizer, pulse, lambda: passes.append(None))
    pulse.completed(1)

    def phase() -> Phase:
        return board.beat(0).phase

    model.eval()
    model(torch.ones(2))
    assert phase() is Phase.EVALUATE
    model.train()
    assert not passes
    loss = model(torch.ones(2)).sum()
    assert len(passes) == 1
    assert phase() is Phase.BACKWARD
    loss.backward()
    optimizer.step()
    assert phase() is Phase.STEPPED
    with torch.no_grad():
        model(torch.ones(2))
    assert phase() is Phase.FORWARD
    board.close()
    os.close(fd)


SCRIPT = """
import json, os, signal, sys
import torch
import autoglm_resume as autoglm

torch.manual_seed(0)
model = torch.nn.Linear(3, 3)
session = autoglm.init(checkpoint_dir=sys.argv[1], every_steps=3)
session.track(model=model)
for step in session.steps(10):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    with torch.no_grad():
        model.weight += torch.randn(3, 3)
print(json.dumps(model.weight.tolist()))
"""


def test_a_script_killed_by_sigkill_continues_exactly(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "train.py", "ckpt", str(die_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

    assert run(7).returncode == -signal.SIGKILL
    resumed = run(-1)
    assert resumed.returncode == 0, resumed.stderr
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        for _ in range(10):
            model.weight += torch.randn(3, 3)
    assert json.loads(resumed.stdout) == model.weight.tolist()
    assert steps_kept(3) == [6, 9, 10]


def test_alone_a_session_belongs_to_no_run_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    session = autoglm.init(checkpoint_dir="ckpt")
    assert (session.rank, session.world_size) == (0, 1)
    assert (session.run_id, session.attempt) == (None, 0)
    assert session.run_dir == Path.cwd() / "ckpt"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert session.attempt == 2
