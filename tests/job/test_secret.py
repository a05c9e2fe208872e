from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.job import secret
from autoglm_resume.job.secret import (
    Secrets,
    arguments,
    command,
    is_secret,
    variables,
    without_logins,
)

KEY = "hunter2secret"
JOB: dict[str, Any] = {"name": "job", "env": {}, "args": [], "notify": [], "checkpoint": {}}


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWORD"),
        *("MYSQL_PASSWD", "GCP_CREDENTIALS", "BASIC_AUTH", "AUTHORIZATION", "SLACK_WEBHOOK"),
        *("--api-key", "wandb.api_key", "apiKey", "openaiApiKey", "HFTOKEN", "githubToken"),
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name, KEY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TOKENIZERS_PARALLELISM", "false"), ("AUTHOR", "me"), ("MONKEY", "banana")),
        *(("KEYBOARD", "de"), ("--max-tokens", "4096"), ("--pad-token-id", "0"), ("PWD", "/tmp")),
        *(("OMP_NUM_THREADS", "1"), ("--pad-token-id", "-100"), ("--auth", "none"), ("PASS", "")),
    ],
)
def test_a_setting_is_not_taken_for_one(name: str, value: str) -> None:
    assert not is_secret(name, value)


def test_variables_and_arguments_are_shown_without_them() -> None:
    assert variables({"HF_TOKEN": KEY, "MODE": "fast", "URL": f"https://me:{KEY}@host/x"}) == {
        "HF_TOKEN": "…",
        "MODE": "fast",
        "URL": "https://…@host/x",
    }
    words = ["--lr", "3e-4", "--api-key", KEY, f"--token={KEY}", f"wandb.api_key={KEY}", "--key"]
    shown = ["--lr", "3e-4", "--api-key", "…", "--token=…", "wandb.api_key=…", "--key"]
    assert arguments(words) == shown
    assert arguments(["--use-auth", "--lr", "1"]) == ["--use-auth", "--lr", "1"]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (["mail", "-s", "training", "me"], ["mail", "-s", "training", "me"]),
        (["curl", f"https://h.test/{KEY}"], ["curl", "https://h.test/…"]),
        (["curl", "-H", f"Authorization: Bearer {KEY}"], ["curl", "-H", "Authorization: …"]),
        (["curl", "-d", f"token={KEY}&x=1"], ["curl", "-d", "token=…"]),
        (f"curl --password {KEY} https://h.test/a/{KEY}", "curl --password … https://h.test/…"),
    ],
)
def test_a_command_that_tells_is_shown_without_them(written: Any, shown: Any) -> None:
    assert command(written) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot reach s3://me:{KEY}@host/b", "cannot reach s3://…@host/b"),
        ("see https://host/path and me@host", "see https://host/path and me@host"),
    ],
)
def test_logins_in_addresses_are_hidden_wherever_they_stand(text: str, shown: str) -> None:
    assert without_logins(text) == shown


@given(st.text(min_size=secret.SHORTEST), st.text(), st.text())
def test_a_text_that_repeats_a_secret_is_said_without_it(key: str, before: str, after: str) -> None:
    secrets = Secrets(JOB, {"API_KEY": key})
    if is_secret("API_KEY", key):
        assert key not in secrets.out_of(f"{before}{key}{after}").replace(secret.HIDDEN, "\0")


def test_secrets_are_those_of_variables_arguments_and_addresses() -> None:
    job = {
        **JOB,
        "args": ["--api-key=of an argument"],
        "notify": [
            {"webhook": "https://h.test/services/of-a-hook", "command": None},
            {"webhook": "$HOOK", "command": None},
            {"webhook": None, "command": ["curl", "-H", "X-Api-Key: of-a-command"]},
        ],
    }
    secrets = Secrets(job, {"HOOK": "https://h.test/from-a-variable", "LEVEL": "ordinary"})
    said = "of an argument, https://h.test/services/of-a-hook"
    said += ", https://h.test/from-a-variable, ordinary"
    assert secrets.out_of(said) == "…, …, …, ordinary"
    assert Secrets(JOB, {"TOKEN": "short"}).out_of("a short text") == "a short text"
