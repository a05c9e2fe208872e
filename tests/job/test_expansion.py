"""Variables, aliases and merge keys: what a job file holds becomes where it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autoglm_resume.errors import UsageError
from autoglm_resume.job.load import from_snapshot, load
from autoglm_resume.job.paths import as_written
from autoglm_resume.job.spec import Job, dump


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    return tmp_path


def job(text: str, *overrides: str) -> Job:
    Path("job.yaml").write_text(f"script: train.py\n{text}")
    return load("job.yaml", overrides)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("$HOME", "/home/me"),
        ("--data=${DATA}/$DATA", "--data=/data//data"),
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("$$HOME", "$HOME"),
        ("$${DATA}", "${DATA}"),
        ("${UNSET:-a b}${EMPTY:-c}${DATA:-d}", "a bc/data"),
        ("[$EMPTY]${UNSET:-}", "[]"),
        *((text, text) for text in ("--out=~/x", "~db", "a ~/b", "^x$", "$5", "a$", "${}", "7")),
    ],
)
def test_arguments_and_variables_are_expanded(written: str, meant: str) -> None:
    loaded = job(yaml.safe_dump({"args": [written], "env": {"VALUE": written}}))
    assert loaded.args == (meant,)
    assert loaded.env == {"VALUE": meant}
    again = yaml.safe_dump(as_written(dump(loaded)))
    Path("again.yaml").write_text(again)
    assert load("again.yaml") == loaded or meant.startswith("~")
    assert from_snapshot(dump(loaded)) == loaded


def test_an_override_is_expanded_too() -> None:
    assert job("args: [a]", "args.0=$DATA/x").args == ("/data/x",)


def test_a_variable_that_is_not_set_is_named_with_its_place() -> None:
    with pytest.raises(UsageError) as refused:
        job("args: [a, --data=$UNSET]\nenv: {OUT: '${UNSET}'}\n")
    assert refused.value.message.splitlines() == [
        "job.yaml:2:11: args.1: the variable UNSET in '--data=$UNSET' is not set",
        "job.yaml:3:12: env.OUT: the variable UNSET in '${UNSET}' is not set",
    ]
    assert "${NAME:-default}" in refused.value.hint
    assert "$$" in refused.value.hint


def test_aliases_and_merge_keys_are_what_they_stand_for() -> None:
    loaded = job("""
x-restart: &calm {backoff: 5s, max_restarts: 3}
x-more: &more {max_restarts: 7, cool_down: 1m}
args: &args [--lr, 0.1]
restart: {<<: [*calm, *more], cool_downs: 2}
heartbeat: &beat {timeout: 1m}
notify:
  - &chat {command: [say, it]}
  - {<<: *chat, command: [say, that]}
""")
    assert (loaded.restart.backoff, loaded.restart.max_restarts) == (5.0, 3)
    assert (loaded.restart.cool_down, loaded.restart.cool_downs) == (60.0, 2)
    assert [notice.command for notice in loaded.notify] == [("say", "it"), ("say", "that")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("restart: {<<: 5}", "job.yaml:2:10: restart: <<: expected an alias of a mapping, or a"
         " list of them"),
        ("x-a: &a {backof: 5s}\nrestart: {<<: *a}", "job.yaml:2:10: restart.backof: unknown key,"
         " did you mean 'backoff'?"),
        ("y-a: 1", "job.yaml:2:1: y-a: unknown key"),
        ("restart: {backoff: 1s, backoff: 2s}", "job.yaml:2:24: restart.backoff: given twice,"
         " first at job.yaml:2:11"),
    ],
)  # fmt: skip
def test_what_they_hold_is_checked_where_it_stands(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        job(text)
    assert refused.value.message.splitlines() == [problem]
