from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.job.load import from_snapshot, load
from autoglm_resume.job.secret import mask
from autoglm_resume.job.spec import Job, dump, json_schema, shown

SECRET = "https://hooks.slack.com/services/T0/B0/secret"


def job(tmp_path: Path, notify: str) -> Job:
    (tmp_path / "train.py").touch()
    file = tmp_path / "job.yaml"
    file.write_text(f"script: train.py\nnotify:\n{notify}\n")
    return load(file)


def test_webhooks_and_commands_say_of_what_they_are_told(tmp_path: Path) -> None:
    found = job(
        tmp_path,
        "  - {webhook: $SLACK_URL, on: [gave_up]}\n"
        "  - {command: [mail, -s, training, me]}\n"
        "  - {command: cat >> told.jsonl}",
    )
    slack, mail, line = found.notify
    assert (slack.webhook, slack.on) == ("$SLACK_URL", ("gave_up",))
    assert mail.command == ("mail", "-s", "training", "me")
    assert line.command == "cat >> told.jsonl"
    assert "failed" in line.on
    assert "straggler" not in line.on
    assert from_snapshot(json.loads(json.dumps(dump(found)))) == found


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{on: [failed]}", "missing: give webhook or command"),
        ("{webhook: 'http://h/x', command: [a]}", "webhook and command are both given"),
        (f"{{webhook: 'ftp{SECRET}'}}", "expected https://… or $VARIABLE"),
        ("{command: []}", "expected a command such as"),
        ("{command: ''}", "expected a command such as"),
        ("{command: [a], on: [explosion]}", "expected started, failed"),
        ("{command: [a], no: [failed]}", "unknown key"),
        ("mail", "expected a mapping"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_line(tmp_path: Path, entry: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        job(tmp_path, f"  - {entry}")
    assert problem in refused.value.message
    assert "job.yaml:3:" in refused.value.message
    assert "secret" not in refused.value.message


def test_an_address_is_in_the_runs_own_job_and_nowhere_else(tmp_path: Path) -> None:
    found = job(tmp_path, f"  - webhook: {SECRET}")
    assert dump(found)["notify"][0]["webhook"] == SECRET
    assert shown(found)["notify"][0]["webhook"] == "https://hooks.slack.com/…"


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (SECRET, "https://hooks.slack.com/…"),
        ("http://user:password@host:8080/x?token=y", "http://host:8080/…"),
        ("$SLACK_URL", "$SLACK_URL"),
        ("https://[broken", "…"),
    ],
)
def test_an_address_is_shown_without_what_makes_it_secret(url: str, masked: str) -> None:
    assert mask(url) == masked


def test_editors_know_the_occasions() -> None:
    text = json.dumps(json_schema())
    assert '"gave_up"' in text
