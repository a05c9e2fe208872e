from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.base.gpu_exclusion import VISIBLE, can_shrink, excluding, without


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")


def job(ranks: int, gpus: str | None = None, world_size: str = "elastic", **fields: Any) -> Job:
    env = {} if gpus is None else {VISIBLE: gpus}
    return Job.model_validate(
        {
            **{"name": "a", "script": "/a", "workdir": "/", "run_dir": "/r"},
            **{"checkpoint": {"dir": "/c"}, "guards": {"world_size": world_size}},
            **{"nproc_per_node": ranks, "env": env, **fields},
        }
    )


@pytest.mark.parametrize(
    ("what", "can"),
    [
        (job(2), True),
        (job(1), False),
        (job(2, world_size="strict"), False),
        (job(2, "0,1", "strict"), False),
        (job(2, "0,1,2", "strict"), True),
        (job(1, "0,1", "strict"), True),
        (job(1, "0"), False),
        (job(2, "0,1"), True),
    ],
)
def test_a_job_can_do_with_less_if_it_is_elastic_or_has_a_gpu_to_spare(
    what: Job, can: bool
) -> None:
    assert can_shrink(what) is can


@pytest.mark.parametrize(
    ("what", "ranks_out", "ranks", "gpus"),
    [
        (job(3), [1], 2, None),
        (job(3), [1, 0], 1, None),
        (job(3, "4,5,6"), [1], 2, "4,6"),
        (job(3, "4,5,6"), [1, 1], 1, "4"),
        (job(2, "4,5,6", "strict"), [1], 2, "4,6"),
        (job(2, "GPU-a,GPU-b"), [0], 1, "GPU-b"),
        (job(3, "4,5"), [2], 2, "4,5"),
    ],
)
def test_what_failed_is_left_out(
    what: Job, ranks_out: list[int], ranks: int, gpus: str | None
) -> None:
    excluded = []
    smaller = what
    for rank in ranks_out:
        excluded.append(excluding(smaller, rank))
        smaller = without(what, excluded)
    assert smaller.nproc_per_node == ranks
    assert smaller.env.get(VISIBLE) == gpus


def test_what_was_excluded_on_another_machine_does_not_matter_here() -> None:
    what = job(2, "0,1")
    assert without(what, [replace(excluding(what, 1), host="elsewhere")]) == what
    assert without(what, []) == what


def test_the_last_gpu_is_never_left_out() -> None:
    what = job(1, "0")
    assert without(what, [excluding(what, 0)]) == what
