"""How a script alone ends that has left its loop while something held the iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_resume.worker import alone
from tests.worker.alone import checkpoints, end_process, lonely
from tests.worker.test_leaving import Training, exits, leaves_by_an_exception, saved


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Bar:
    """As progress bars and prefetchers do it: the iterator is theirs for as long as they live."""

    def __init__(self, steps: Iterator[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:  # noqa: UP028
            yield step


def breaks(bar: Bar, training: Training) -> None:
    for step in bar:
        training.step()
        if step == 3:
            break


def breaks_in_a_function(training: Training) -> None:
    bar = Bar(training.steps())
    breaks(bar, training)


held: list[Bar] = []


def never_lets_go(training: Training) -> None:
    held[:] = [Bar(training.steps())]
    breaks(held[0], training)


@pytest.mark.parametrize("end", [breaks_in_a_function, never_lets_go])
def test_it_does_not_end_as_if_its_result_were_there(
    end: Callable[[Training], None], capfd: pytest.CaptureFixture[str]
) -> None:
    training = Training(every_steps=2)
    end(training)
    end_process()
    said = capfd.readouterr().err
    assert "autoglm: steps 3 to 4 are in no checkpoint: the loop over session.steps()" in said
    assert "session.save() behind the loop" in said
    assert alone._code == 1


@pytest.mark.parametrize("end", [breaks_in_a_function, never_lets_go])
def test_what_it_saves_behind_the_loop_is_its_result(end: Callable[[Training], None]) -> None:
    training = Training(every_steps=2)
    end(training)
    assert training.session.save()
    assert saved() == (4, 4.0)
    assert alone._code == 0


@pytest.mark.parametrize("end", [leaves_by_an_exception, exits])
def test_by_an_exception_the_script_knows_how_it_ended(
    end: Callable[[Training], None], capfd: pytest.CaptureFixture[str]
) -> None:
    end(Training())
    assert checkpoints() == []
    assert "autoglm: steps 1 to 3 are in no checkpoint\n" in capfd.readouterr().err
    assert alone._code == 0, "an exit code of its own stays"


def test_who_only_looks_at_the_first_step_has_lost_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps = Training().steps()
    assert next(steps) == 0
    end_process()
    assert "in no checkpoint" not in capfd.readouterr().err
    assert alone._code == 0
