"""The command as people start it: real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import Script, checkpoint, directory, flip, killed_once
from tests.patience import PATIENCE

HEAVY = ("torch", "numpy", "pydantic", "yaml", "rich", "psutil", "pickle", "asyncio")


def autoglm(
    *arguments: str | Path, cwd: Path | None = None, report: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command; with `report`, the modules it had imported are written there."""
    code = "from autoglm_resume.cli.app import main\n"
    if report is not None:
        code += (
            "import atexit, pathlib, sys\n"
            f"report = pathlib.Path({str(report)!r})\n"
            "atexit.register(lambda: report.write_text(' '.join(sys.modules)))\n"
        )
    return subprocess.run(
        [sys.executable, "-c", code + "main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one real checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    checkpoint(path / "checkpoints", 20)
    directory(path, [e for e in killed_once().events if e.event != "model"])
    log = path / "attempts" / "000" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {n}\n" for n in range(20_000)))
    return path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["inspect", "ckpt", "RUN"], ["runs"]],
)
def test_starting_is_cheap(arguments: list[str], run: Path, tmp_path: Path) -> None:
    imported = tmp_path / "modules"
    given = [run if argument == "RUN" else argument for argument in arguments]
    assert autoglm(*given, report=imported).returncode == 0
    found = set(imported.read_text().split())
    assert "autoglm_resume.cli.app" in found
    assert found.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "command",
    [
        *("run", "resume", "status", "logs", "save", "stop", "ckpts", "prune", "verify", "schema"),
        *("export", "import", "explain", "doctor", "runs"),
        "inspect ckpt",
        *("export", "import"),
        *("inspect ckpt", "slurm submit"),
    ],
)
def test_every_command_explains_itself_with_examples(command: str) -> None:
    for flag in ("--help", "-h"):
        shown = autoglm(*command.split(), flag)
        assert shown.returncode == 0
        assert f"  autoglm {command}" in shown.stdout


@pytest.mark.parametrize("group", [[], ["inspect"], ["slurm"]])
def test_the_help_of_a_group_fits_a_terminal_of_80_columns(
    group: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = autoglm(*group, "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "..." in line.replace("[ARGS]...", "")] == []


def test_the_help_lists_the_exit_codes() -> None:
    words = " ".join(autoglm("--help").stdout.split())
    for code in (
        "0 done",
        "1 failed",
        "2 wrong usage",
        "75 interrupted",
        "76 another",
        "90 no",
        "93",
    ):
        assert code in words


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run"],
        ["run", "--no-such-option", "job.yaml"],
        ["run", "missing.yaml"],
        ["inspect", "ckpt"],
        ["inspect", "ckpt", "one", "two"],
        ["inspect", "ckpt", "missing"],
        ["logs", "--rank", "x"],
        ["logs", "--rank", "-1"],
        ["status"],
        ["status", "missing"],
        ["resume", "missing"],
        ["stop"],
        ["save"],
        ["verify", "missing"],
        ["ckpts", "missing"],
        ["prune"],
        ["prune", "missing"],
        ["resume", "--from", "x"],
        ["resume", "--all", "missing"],
        ["resume", "--all", "--from", "3"],
        ["slurm"],
        ["slurm", "submit"],
        ["slurm", "submit", "missing.yaml"],
    ],
)
def test_bad_usage_exits_2_and_says_why_without_a_traceback(
    arguments: list[str], tmp_path: Path
) -> None:
    ended = autoglm(*arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.strip()
    assert "Traceback" not in ended.stderr


def test_a_bad_job_file_is_refused_with_all_its_problems(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\ncheckpoint:\n  evry: 3\nkeep: x\n")
    ended = autoglm("run", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    assert "job.yaml:3:3: checkpoint.evry: unknown key, did you mean 'every'?" in ended.stderr
    assert "job.yaml:4:1: keep" in ended.stderr


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\nnproc_per_node: 2\n")
    ended = autoglm("run", "job.yaml", "--dry-run", "--json", cwd=tmp_path)
    assert ended.returncode == 0
    plan = json.loads(ended.stdout)
    assert plan["job"]["nproc_per_node"] == 2
    assert plan["command"][-1] == str(tmp_path / "train.py")
    assert not (tmp_path / "runs").exists()


def test_a_job_for_slurm_is_printed_with_every_option_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\n")
    options = ["--set", "restart.max_restarts=3", "--time", "30", "--dry-run", "--", "--mem=4G"]
    ended = autoglm("slurm", "submit", "job.yaml", *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --time=30\n#SBATCH --mem=4G\n" in ended.stdout
    assert f"run {tmp_path}/job.yaml --set restart.max_restarts=3)" in ended.stdout
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_a_person_hears_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = autoglm("slurm", "submit", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    assert "sbatch: not found here" in ended.stderr
    assert "--dry-run" in ended.stderr


def test_resuming_a_finished_run_says_so_and_exits_0(run: Path) -> None:
    job = {"name": "demo", "script": "/train.py", "workdir": "/", "run_dir": str(run)}
    before = (run / "job.json").read_text()
    checkpoints = {"dir": str(run / "checkpoints")}
    (run / "job.json").write_text(json.dumps({**job, "checkpoint": checkpoints}))
    ended = autoglm("resume", run, "--json")
    (run / "job.json").write_text(before)
    assert ended.returncode == 0
    assert "finished" in ended.stderr
    assert json.loads(ended.stdout)["state"] == "finished"


def test_the_newest_run_is_meant_when_none_is_named(run: Path) -> None:
    (run.parent / "runs").symlink_to(run.parent)
    ended = autoglm("status", "--json", cwd=run.parent)
    assert json.loads(ended.stdout)["name"] == "demo"
    (run.parent / "runs").unlink()


def test_a_directory_of_runs_is_listed(run: Path) -> None:
    lines = autoglm("status", run.parent).stdout.splitlines()
    assert lines[0].startswith("run")
    assert lines[1].startswith("demo")
    assert [each["step"] for each in json.loads(autoglm("status", run.parent, "--json").stdout)]


def test_one_run_that_cannot_be_read_hides_no_other(run: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").symlink_to(run)
    directory(tmp_path / "torn", Script().life().events)
    (tmp_path / "torn" / "job.json").write_text('{"name": "to')
    ended = autoglm("status", tmp_path)
    assert ended.returncode == 0
    rows = {line.split()[0]: line for line in ended.stdout.splitlines()[1:]}
    assert "job.json: expected JSON, found" in rows["torn"]
    assert "finished" in rows["whole"]
    states = {each["state"] for each in json.loads(autoglm("status", tmp_path, "--json").stdout)}
    assert states == {"finished", "unreadable"}


def test_a_job_of_another_shape_is_no_reason_to_say_nothing(tmp_path: Path) -> None:
    path = directory(tmp_path / "odd", Script().life().events)
    (path / "job.json").write_text('{"checkpoint": [1], "heartbeat": "x"}')
    assert autoglm("status", path).returncode == 0


def test_continuing_all_runs_of_a_run_is_refused_and_of_nothing_is_said(
    run: Path, tmp_path: Path
) -> None:
    refused = autoglm("resume", "--all", run)
    assert refused.returncode == 2
    assert f"autoglm resume {run}" in refused.stderr
    nothing = autoglm("resume", "--all", tmp_path)
    assert (nothing.returncode, nothing.stdout) == (0, f"{tmp_path}: no run there\n")
    assert json.loads(autoglm("resume", "--all", tmp_path, "--json").stdout) == []


def test_a_run_is_explained_attempt_by_attempt(run: Path, tmp_path: Path) -> None:
    imported = tmp_path / "modules"
    told = autoglm("explain", run, report=imported)
    assert told.stdout.startswith("demo: done at step 10\n")
    assert "  concluded  killed: as the drill meant it" in told.stdout
    assert "torch" not in imported.read_text().split()
    (story,) = json.loads(autoglm("explain", run, "--attempt", "1", "--json").stdout)["attempts"]
    assert story["outcome"] == "completed"
    missing = autoglm("explain", run, "--attempt", "9")
    assert missing.returncode == 2
    assert "found attempts 0 to 1" in missing.stderr


def test_a_machine_is_examined_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\nnproc_per_node: 2\n")
    imported = tmp_path / "modules"
    found = autoglm("doctor", tmp_path / "job.yaml", "--json", report=imported)
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    assert checks["torch"]["found"].startswith("torch ")
    assert checks["collective round"]["found"].startswith("2 processes in ")
    assert checks["pidfd"]["verdict"] == "ok"
    assert found.returncode == any(each["verdict"] == "wrong" for each in checks.values())
    assert "torch" not in imported.read_text().split()
    assert not (tmp_path / "runs").exists()


def test_inspect_reads_manifest_tensors_and_every_byte(run: Path) -> None:
    ended = autoglm("inspect", "ckpt", run, "--verify", "--tensors", "--json")
    document = json.loads(ended.stdout)
    assert ended.returncode == 0
    assert document["checks"][0]["found"] == "verified by content"
    assert len(document["tensors"]) == 4
    assert [each["step"] for each in document["all"]] == [20]


def test_damage_exits_90_and_names_the_file(run: Path, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    flip(made / "rank-00001.pack")
    ended = autoglm("inspect", "ckpt", made)
    assert ended.returncode == 90
    assert f"{made}/rank-00001.pack" in ended.stdout
    assert autoglm("verify", made).returncode == 90
    some = autoglm("verify", tmp_path, "--json")
    assert some.returncode == 1
    assert [each["accepted"] for each in json.loads(some.stdout)] == [True, False]
    assert autoglm("verify", run).returncode == 0


def test_checkpoints_are_listed(run: Path) -> None:
    listed = autoglm("ckpts", run)
    assert listed.returncode == 0
    assert listed.stdout.splitlines()[1].startswith("step-0000000020.a0")
    document = json.loads(autoglm("ckpts", run / "checkpoints", "--json").stdout)
    assert [each["kept"] for each in document["checkpoints"]] == [["one of the last 3"]]


def test_pruning_says_first_what_it_would_do(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        checkpoint(root, step)
    would = autoglm("prune", root, "--keep", "{last: 1, every_steps: 20}", "--dry-run")
    assert would.returncode == 0
    assert "1 checkpoint would be deleted" in would.stdout
    assert len(list(root.glob("step-*"))) == 3
    assert autoglm("prune", root).returncode == 2
    wrong = autoglm("prune", root, "--keep", "some")
    assert wrong.returncode == 2
    assert "checkpoint.keep: expected a whole number" in wrong.stderr
    assert autoglm("prune", root, "--keep", "2").returncode == 0
    assert sorted(path.name[:15] for path in root.glob("step-*")) == [
        "step-0000000020",
        "step-0000000030",
    ]
    assert autoglm("prune", run).stdout.endswith("0 checkpoints deleted, 0 B freed\n")


def test_pruning_leaves_a_running_run_alone(run: Path) -> None:
    with RunDirectory(run).locked():
        refused = autoglm("prune", run, "--keep", "1")
        assert refused.returncode == 76
        assert "another supervisor has it" in refused.stderr
        assert autoglm("prune", run, "--keep", "1", "--dry-run").returncode == 0


def test_a_run_that_is_not_running_cannot_be_saved(run: Path) -> None:
    ended = autoglm("save", run)
    assert ended.returncode == 1
    assert "not running" in ended.stderr


def test_a_step_to_resume_from_must_be_there(run: Path) -> None:
    job = {"name": "demo", "script": "/train.py", "workdir": "/", "run_dir": str(run)}
    before = (run / "job.json").read_text()
    checkpoints = {"dir": str(run / "checkpoints")}
    (run / "job.json").write_text(json.dumps({**job, "checkpoint": checkpoints}))
    ended = autoglm("resume", run, "--from", "7")
    (run / "job.json").write_text(before)
    assert ended.returncode == 2
    assert "no checkpoint of step 7; there are those of steps 20" in ended.stderr


def test_a_run_that_is_not_running_need_not_be_stopped(run: Path) -> None:
    ended = autoglm("stop", run)
    assert ended.returncode == 0
    assert "not running" in ended.stdout


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
    command = [sys.executable, "-m", "autoglm_resume.cli", "logs", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"[rank 0] line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_schema_is_json() -> None:
    assert "checkpoint" in json.loads(autoglm("schema").stdout)["properties"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "events.jsonl").chmod(0)
    ended = autoglm("status", tmp_path)
    assert ended.returncode == 1
    assert "events.jsonl: Permission denied" in ended.stderr


def test_an_unreadable_journal_line_is_skipped(tmp_path: Path) -> None:
    path = directory(tmp_path / "torn", Script().life().events)
    with (path / "events.jsonl").open("ab") as journal:
        journal.write(b'{"event": "run_comp')
    assert autoglm("status", path).returncode == 0
