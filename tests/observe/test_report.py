from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from autoglm_resume.observe import report
from autoglm_resume.observe.live import Screen
from autoglm_resume.observe.pure.goodput import summarize
from tests.observe.runs import Script, directory, killed_once


def shown(run: Script) -> str:
    stream = io.StringIO()
    report.show(summarize(run.events), stream)
    return stream.getvalue()


def test_the_timeline_tells_the_whole_story() -> None:
    text = shown(killed_once())
    assert "Timeline of demo, 2 ranks, 2 attempts" in text
    row = next(line for line in text.splitlines() if line.startswith("1 "))
    assert "drill: rank 1 died by SIGKILL at step 6, in backward" in row
    for part in ("40 ms", "step 4", "1.70 s"):
        assert part in row
    assert row.endswith(" 2")
    assert "step 4 taken: the newest, accepted on integrity, world size" in text
    assert "detect 40 ms + stop 60 ms" in text
    assert "goodput          64.5%" in text


def test_the_last_lines_are_the_digests_the_model_first() -> None:
    assert shown(killed_once()).splitlines()[-2:] == [
        "final model      blake3:f",
        "final rng        blake3:r",
    ]


def test_rejected_checkpoints_are_explained() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 70).gate(40, rejected=(60,))
    run.attempt(1, 40, "step-0000000040.a0").at(8).both("first_step", attempt=1, step=41)
    text = shown(run)
    assert "step 60 rejected: integrity: rank-00001.pack: chunk 3" in text
    assert "step 40 taken: the newest acceptable" in text


def test_a_run_without_failures_has_only_facts() -> None:
    run = Script().life().attempt(0).both("first_step", attempt=0, step=1).at(9)
    text = shown(run.say("run_completed", step=9))
    assert "what died" not in text
    assert "state" in text


def test_how_often_it_saves_is_told_with_the_latest_reason() -> None:
    run = Script().life().attempt(0)
    for reason in ("every 1m until a save has shown what it costs", "every 4m10s: a save costs"):
        run.say("interval", attempt=0, seconds=60.0, reason=reason)
    assert "saves       every 4m10s: a save costs" in shown(run)
    assert "\nsaves" not in shown(killed_once())


def test_the_json_form_has_every_figure() -> None:
    stream = io.StringIO()
    report.show(summarize(killed_once().events), stream, json=True)
    document = json.loads(stream.getvalue())
    assert document["goodput"] == pytest.approx(10 / 15.5)
    (recovery,) = document["recoveries"]
    assert recovery["phases"]["detect"] == pytest.approx(0.04)
    assert recovery["total"] == pytest.approx(1.7)
    assert document["objects"] == {"model": "blake3:f", "rng": "blake3:r"}


def test_the_report_comes_after_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = directory(tmp_path / "demo", killed_once().events)
    with report.afterwards(run, Screen(), json=False):
        print("training")
    assert capsys.readouterr().out.startswith("training\n\nTimeline of demo")


def test_after_an_interrupted_run_the_command_that_continues_it_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Script().life().attempt(0).say("run_interrupted", code=75, reason="stopped").events
    run = directory(tmp_path / "my demo", events)
    with report.afterwards(run, Screen(), json=False):
        pass
    assert capsys.readouterr().err == f"autoglm: continue with: autoglm resume '{run}'\n"


def test_a_run_that_could_not_start_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with report.afterwards(tmp_path, Screen(), json=False):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert capsys.readouterr().out == ""
