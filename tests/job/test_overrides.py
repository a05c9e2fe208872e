"""What the command line says of a job, beside the file or in place of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.job.load import load
from autoglm_resume.job.spec import Job

TEXT = """\
script: train.py
args: [--lr, 0.1, --steps, 007]
restart: {on: {cuda_oom: stop}}
notify:
  - {webhook: "https://example.org/a"}
  - {command: [say, it]}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(*overrides: str) -> Job:
    return load("job.yaml", overrides)


def test_an_override_reaches_into_lists() -> None:
    assert job("args.1=010").args == ("--lr", "010", "--steps", "007")
    assert job("args.4=--fast", "args.5=5").args[4:] == ("--fast", "5")
    assert job("notify.1.command.1=that").notify[1].command == ("say", "that")
    assert job("checkpoint.replicas=[]", "checkpoint.replicas.0=/copies").checkpoint.replicas == (
        "/copies",
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("args.5=1", "args is a list: expected the number of one of its entries (0 to 3), found"
         " '5'"),
        ("args.lr=1", "args is a list: expected the number of one of its entries (0 to 3), found"
         " 'lr'"),
        ("notify.2.webhook=x", "notify is a list: expected the number of one of its entries (0 to"
         " 1), found '2'"),
        ("args.1=[1]", "args.1: expected text, found a list"),
        ("notify.0.webhok=1", "notify.0.webhok: unknown key"),
    ],
)  # fmt: skip
def test_a_place_that_a_list_has_not_is_named(override: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        job(override)
    assert f"--set {override}: {problem}" in refused.value.message.splitlines()


def test_further_arguments_stand_behind_those_of_the_job_as_they_were_typed() -> None:
    loaded = load("job.yaml", ["args=[a]"], ["--lr", "0.10", "$HOME", "~", "$$"])
    assert loaded.args == ("a", "--lr", "0.10", "$HOME", "~", "$$")


def test_further_arguments_do_not_hide_that_those_of_the_job_are_no_list() -> None:
    with pytest.raises(UsageError, match="expected a list, found 'a'"):
        load("job.yaml", ["args=a"], ["b"])
    with pytest.raises(UsageError, match="holds a NUL character"):
        load("job.yaml", [], ["b\0"])


def test_a_script_is_a_job_that_runs_from_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "a $b").mkdir()
    (home / "a $b/fit.py").touch()
    loaded = load("a $b/fit.py", ["nproc_per_node=2"], ["--lr", "0.1"])
    assert loaded.script == home / "a $b/fit.py"
    assert (loaded.name, loaded.workdir, loaded.run_dir) == ("fit", home, home / "runs/fit")
    assert (loaded.args, loaded.nproc_per_node) == (("--lr", "0.1"), 2)
    assert load("train.py").nproc_per_node == "auto"
    with pytest.raises(UsageError, match=r"no such file: .*did you mean 'train.py'"):
        load("tran.py")
