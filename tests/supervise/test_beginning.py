"""A new run that begins with what another has made."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.errors import NoAcceptableCheckpoint, UsageError
from autoglm_resume.events import BegunFrom, RunStarted
from autoglm_resume.job.load import load
from autoglm_resume.job.spec import Job, dump
from autoglm_resume.observe.live import Screen
from autoglm_resume.supervise import start
from tests.observe.runs import checkpoint, directory, flip


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A checkpoint."""
    return tmp_path / "pre" / checkpoint(tmp_path / "pre", 10, ranks=1)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "train.py").touch()
    (tmp_path / "tune.yaml").write_text("script: train.py\n")
    return load(tmp_path / "tune.yaml")


def test_it_is_verified_first_and_has_what_is_asked_for(there: Path) -> None:
    begins = start.beginning(there, ["model"])
    assert (begins.path, begins.step, begins.only) == (str(there), 10, ("model",))
    with pytest.raises(UsageError, match="no object 'modle'; there are model"):
        start.beginning(there, ["modle"])
    flip(there / "rank-00000.pack")
    with pytest.raises(NoAcceptableCheckpoint, match="--init-from"):
        start.beginning(there, ())
    with pytest.raises(NoAcceptableCheckpoint, match="--init-from"):
        start.beginning(there.with_name("step-0000000099.a0"), ())


def test_only_a_new_run_begins_so_and_the_same_command_goes_on_with_it(
    there: Path, job: Job
) -> None:
    begins = start.beginning(there, ["model"])
    assert start.plan(job, begins=begins).outlook == (f"start from step 0, with model from {there}")
    told = [BegunFrom(path=str(there), step=10, digest=begins.digest, only=("model",))]
    directory(Path(job.run_dir), [*told, RunStarted(run_id="abc")], **dump(job))
    assert start.plan(job).outlook == f"start from step 0, with model from {there}"
    assert start.plan(job, begins=begins).code == 0
    with pytest.raises(UsageError, match="this one has begun already"):
        start.plan(job, begins=start.beginning(there, []))
    assert start.plan(job, fresh=True, begins=start.beginning(there, [])).code == 0


def test_it_does_not_begin_beside_checkpoints_or_with_what_would_be_set_aside(
    there: Path, job: Job
) -> None:
    begins = start.beginning(there, [])
    checkpoint(Path(job.checkpoint.dir), 5, ranks=1)
    with pytest.raises(UsageError, match="this one has begun already"):
        start.start(job, Screen(), begins=begins)
    own = Path(job.checkpoint.dir) / "step-0000000005.a0"
    with pytest.raises(UsageError, match="that --fresh would set aside"):
        start.start(job, Screen(), fresh=True, begins=start.beginning(own, []))
    assert own.is_dir()
