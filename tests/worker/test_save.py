"""What `session.save()` saves, and its word for it: alone, one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from tests.worker.alone import end_process, lonely
from tests.worker.test_session import Training, steps_saved


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


def trained(**options: Any) -> Training:
    """After one step of a loop of one's own, which was saved as often as `options` say."""
    training = Training(**options)
    training.session.resume()
    training.step([1])
    training.session.step_done(0)
    return training


@pytest.mark.parametrize("every_steps", [1, 100])
def test_save_saves_what_is_there_though_that_step_was_saved_before(every_steps: int) -> None:
    training = trained(every_steps=every_steps)
    assert training.session.save()
    for averaged in (41.0, 42.0):
        torch.nn.init.constant_(training.model[0].bias, averaged)
        assert training.session.save()
    assert set(steps_saved()) == {1}
    again = Training(every_steps=every_steps)
    assert again.session.resume() == 1
    assert again.model[0].bias.tolist() == [42.0] * 4


def test_save_right_after_a_resume_saves_what_was_changed_since() -> None:
    trained(every_steps=1)
    for value in (1.0, 2.0, 3.0):
        end_process()
        training = Training(every_steps=1)
        assert training.session.resume() == 1
        torch.nn.init.constant_(training.model[0].bias, value)
        assert training.session.save()
    end_process()
    again = Training(every_steps=1)
    assert again.session.resume() == 1
    assert again.model[0].bias.tolist() == [3.0] * 4


def test_save_before_any_step_is_a_checkpoint_of_step_zero() -> None:
    training = Training()
    training.session.resume()
    torch.nn.init.constant_(training.model[0].bias, 7.0)
    assert training.session.save()
    end_process()
    again = Training()
    assert again.session.resume() == 0
    assert again.model[0].bias.tolist() == [7.0] * 4


def test_save_within_a_step_saves_the_whole_step() -> None:
    training = Training(every_steps=100)
    training.session.resume()
    data = iter(training.sampler)
    for step in training.session.steps(6):
        training.step(next(data))
        if step == 2:
            assert training.session.save()
            training.scheduler.step()
            found = training.state()
            state = [found[name] for name in ("model", "momentum", "lr")]
    assert steps_saved() == [3, 6]
    again = Training(every_steps=100)
    store = Store(Path("ckpt"))
    store.delete(store.committed()[0].name)
    assert again.session.resume() == 3
    found = again.state()
    assert [found[name] for name in ("model", "momentum", "lr")] == state


def test_save_between_an_update_and_the_end_of_its_step_is_refused_in_a_loop_of_ones_own() -> None:
    training = trained(every_steps=100)
    training.step([1])
    with pytest.raises(UsageError, match=r"stepped since the last session\.step_done"):
        training.session.save()
    training.session.step_done(1)
    assert training.session.save()


def test_optimizers_that_are_not_tracked_and_steps_before_the_resume_count_for_nothing() -> None:
    training = Training(every_steps=100)
    training.step([1])
    training.session.resume()
    assert training.session.save()
    training.step([1])
    training.session.step_done(0)
    probe = torch.nn.Linear(1, 1)
    evaluation = torch.optim.SGD(probe.parameters(), lr=0.1)
    probe(torch.ones(1)).backward()
    evaluation.step()
    assert training.session.save()
    assert steps_saved() == [0, 1]


def test_a_save_that_cannot_be_made_is_told_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    training = trained(every_steps=100)
    Path("ckpt").rename("away")
    Path("ckpt").write_text("a file is in the way")
    training.session.save()
    end_process()
    said = capfd.readouterr().err
    assert "not saved" in said
    assert "steps 1 to 1 are in no checkpoint" in said


@pytest.mark.parametrize("own_loop", [False, True])
def test_where_nothing_can_be_saved_nothing_is_trained(own_loop: bool) -> None:
    Path("ckpt").write_text("a file is in the way")
    session = autoglm.init(checkpoint_dir="ckpt")
    session.track(model=torch.nn.Linear(1, 1))
    assert session.resume() == 0, "who only looks may do so"
    with pytest.raises(UsageError, match="ckpt: expected a directory that this user can write"):
        session.step_done(0) if own_loop else next(session.steps(3))


def test_figures_of_an_evaluation_after_a_step_are_saved_with_it_and_not_with_the_next() -> None:
    training = trained(every_steps=100)
    training.session.report(accuracy=torch.tensor(0.9))
    assert training.session.save()
    training.step([1])
    training.session.step_done(1, loss=2.0)
    assert training.session.save()
    steps_saved()
    store = Store(Path("ckpt"))
    second, first = (store.load_manifest(path).metrics for path in store.committed())
    assert first == {"accuracy": pytest.approx(0.9)}
    assert second == {"loss": 2.0}
