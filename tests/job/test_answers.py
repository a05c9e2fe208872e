from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.failures import Answer
from autoglm_resume.job.load import from_snapshot, load
from autoglm_resume.job.spec import Job, dump, json_schema


def job(directory: Path, restart: str) -> Job:
    (directory / "train.py").touch()
    path = directory / "job.yaml"
    path.write_text("script: train.py\nrestart:\n  " + restart)
    return load(path)


def test_failures_are_mapped_by_class_code_and_pattern(tmp_path: Path) -> None:
    loaded = job(tmp_path, 'on: {cuda_oom: stop, 17: requeue, "/ECC error/": smaller}')
    assert loaded.restart.on == {
        "cuda_oom": Answer.STOP,
        "17": Answer.REQUEUE,
        "/ECC error/": Answer.SMALLER,
    }
    assert from_snapshot(dump(loaded)) == loaded
    assert dump(loaded)["restart"]["on"]["17"] == "requeue"


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("cuda_omm: stop", r"job.yaml:3:8: restart.on.cuda_omm: .*, did you mean 'cuda_oom'\?$"),
        ("stopped: stop", r"is no failure class, exit code or /pattern/"),
        ("xyzzy: stop", r"the classes are killed, crashed, "),
        ("hang: stpo", r":3:14: restart.on.hang: expected restart, .* did you mean 'stop'\?$"),
        ("hang: true", r"expected restart, .* or stop, found true$"),
        ("0: stop", r"expected one from 1 to 255"),
        ("256: stop", r"expected one from 1 to 255"),
        ("017: stop", r"expected one from 1 to 255"),
        ("93: restart", r"exit code 93 always ends the run"),
        ('"/ECC [/": stop', r"is no regular expression: unterminated character set"),
        ('"//": stop', r"is no failure class"),
        ("checkpoint_rejected: pause", r"expected restart or stop, found 'pause'"),
    ],
)
def test_what_cannot_be_mapped_is_refused_with_its_line(
    tmp_path: Path, on: str, words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        job(tmp_path, f"on: {{{on}}}")
    assert re.search(words, refused.value.message), refused.value.message


def test_every_wrong_answer_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        job(tmp_path, "on: {checkpoint_rejected: smaller, hang: stpo, cuda_omm: stop}")
    rejected, hang, oom = refused.value.message.splitlines()
    assert ": restart.on.checkpoint_rejected: expected restart or stop, found 'smaller'" in rejected
    assert ": restart.on.hang: " in hang
    assert ": restart.on.cuda_omm: " in oom


def test_a_list_of_answers_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a mapping such as .*, found a list"):
        job(tmp_path, "on: [hang]")


def test_the_window_is_a_section_of_its_own(tmp_path: Path) -> None:
    loaded = job(tmp_path, "window: {failures: 20, within: 2h}")
    assert (loaded.restart.window.failures, loaded.restart.window.within) == (20, 7200)
    with pytest.raises(UsageError, match="did you mean 'within'"):
        job(tmp_path, "window: {whithin: 2h}")


def test_the_schema_knows_classes_codes_patterns_and_answers() -> None:
    on = json_schema()["$defs"]["Restart"]["properties"]["on"]
    kinds, code, pattern = on["propertyNames"]["anyOf"]
    assert "cuda_oom" in kinds["enum"]
    assert re.search(code["pattern"], "17")
    assert re.search(pattern["pattern"], "/ECC/")
    assert on["additionalProperties"]["enum"] == [answer.value for answer in Answer]
