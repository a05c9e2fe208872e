from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm_resume.errors import UsageError
from autoglm_resume.job.load import from_snapshot, load
from autoglm_resume.job.spec import Job, dump

Problems = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a training script, where job files are called by their bare name."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(text: str, *overrides: str) -> Job:
    Path("job.yaml").write_text(text, encoding="utf-8")
    return load("job.yaml", overrides)


def problems(text: str | bytes, *overrides: str) -> list[str]:
    """The lines of the refusal of a job file."""
    Path("job.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as refused:
        load("job.yaml", overrides)
    return refused.value.message.splitlines()


def test_a_script_alone_is_a_job(home: Path) -> None:
    loaded = job("script: train.py")
    assert loaded.name == "job"
    assert loaded.script == home / "train.py"
    assert loaded.workdir == home
    assert loaded.run_dir == home / "runs/job"
    assert loaded.checkpoint.dir == home / "runs/job/checkpoints"
    assert loaded.checkpoint.every.seconds == 300
    assert loaded.nproc_per_node == "auto"


def test_an_unknown_key_names_its_line_and_suggests_the_nearest() -> None:
    text = "script: train.py\n\ncheckpoint:\n  keep: 2\n  evry: 5\n"
    assert problems(text) == ["job.yaml:5:3: checkpoint.evry: unknown key, did you mean 'every'?"]


def test_a_key_of_another_section_is_pointed_to() -> None:
    assert problems("script: train.py\nmax_restarts: 5\n") == [
        "job.yaml:2:1: max_restarts: unknown key, did you mean 'restart.max_restarts'?"
    ]


def test_a_wrong_type_says_what_was_expected_and_found() -> None:
    text = "script: train.py\ncheckpoint:\n\n  keyframe_every:   three\n"
    assert problems(text) == [
        "job.yaml:4:21: checkpoint.keyframe_every: expected a whole number ≥ 1, found 'three'"
    ]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(home: Path) -> None:
    text = """\
script: trian.py
nproc_per_node: two
nnodes: 2
checkpoint: {keep: {last: 0}, every: {steps: 0}}
restart: 5
nonsense: 1
"""
    assert problems(text, "evry=1", "restart=6") == [
        f"job.yaml:1:9: script: no such file: {home}/trian.py, did you mean 'train.py'?",
        "job.yaml:2:17: nproc_per_node: expected auto or a whole number ≥ 1, found 'two'",
        "job.yaml:3:9: nnodes: expected 1, found 2: this version runs on one machine, "
        "several nodes come with a later one",
        "job.yaml:4:27: checkpoint.keep.last: expected a whole number ≥ 1, found 0",
        "job.yaml:4:46: checkpoint.every.steps: expected a whole number ≥ 1, found 0",
        "job.yaml:6:1: nonsense: unknown key",
        "--set evry=1: evry: unknown key",
        "--set restart=6: restart: expected a mapping, found 6",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nnodes: 1", "job.yaml:1:1: module: missing: give script or module"),
        ("script: train.py\nmodule: json.tool", ":2:9: module: script and module are both given"),
        ("script: [a]", ":1:9: script: expected a path, found a list"),
        ("script: .", "script: expected a file, found a directory"),
        ("script: train.py\nworkdir: gone", ":2:10: workdir: no such directory: /"),
        ("script: train.py\nworkdir: train.py", "expected a directory, found a file"),
        ("script: $NOT_SET/a.py", "script: the variable NOT_SET in '$NOT_SET/a.py' is not set"),
        ("module: no_such_module", ":1:9: module: no module named 'no_such_module'"),
        ("module: json.no_such", "module: no module named 'json.no_such'"),
        ("module: json", "module: no module named 'json.__main__'"),
        ("module: a-b", "module: expected the dotted name of a module, found 'a-b'"),
        ("script: train.py\npreload: [__main__]", ":2:11: preload.0: __main__ is"),
        ("script: train.py\npreload: [numpi]", ":2:11: preload.0: no module named 'numpi'"),
        ("script: train.py\npreload: numpy", ":2:10: preload: expected a list, found 'numpy'"),
        ("script: train.py\nlauncher: torchrun\npreload: [json]", "only the warm launcher"),
        ("script: train.py\nlauncher: hot", "expected warm or torchrun, found 'hot'"),
        ("script: train.py\nname: a/b", ":2:7: name: expected a plain file name"),
        ("script: train.py\nname: ..", ":2:7: name: expected a plain file name"),
        ("script: train.py\nargs: [a, true]", ":2:11: args.1: expected text, found true; quote"),
        ("script: train.py\nargs: [a, [b]]", "args.1: expected text, found a list"),
        ("script: train.py\nenv: {A: no}", ":2:10: env.A: expected text, found false; quote it"),
        ("script: train.py\nenv: {RANK: 0}", ":2:7: env.RANK: autoglm sets it"),
        ("script: train.py\nenv: {AUTOGLM_X: 0}", ":2:7: env.AUTOGLM_X: autoglm sets it"),
        ("script: train.py\nenv: {TORCHELASTIC_RUN_ID: 0}", "autoglm sets it"),
        ("script: train.py\nenv: {MASTER_ADDR: h}", "autoglm sets it"),
        ("script: train.py\nenv: {MASTER_PORT: 0}", "expected MASTER_PORT from 1 to 65535"),
        ("script: train.py\nenv: [A]", "env: expected a mapping, found a list"),
        ("script: train.py\nenv: {A: }", "env.A: expected text, found nothing"),
        ("script: train.py\nrestart: {backoff: 5m}", "2m is shorter than restart.backoff, 5m"),
        ("script: train.py\nrestart: {max_restarts: -1}", "a whole number ≥ 0, found -1"),
        ("script: train.py\nheartbeat: {timeout: 0}", "longer than 0, found 0"),
        ("script: train.py\nheartbeat: {timeout: 1:30}", "found '1:30'"),
        ("script: train.py\nguards: {free_disk: 4G}", "expected a size such as 500MB or 4GiB"),
        ("script: train.py\nguards: {model: on}", "expected strict or off, found true"),
        ("script: train.py\nguards: {config_files: [a]}", "guards.config_files.0: no such file: /"),
        ("script: train.py\nscript: train.py", ":2:1: script: given twice, first at job.yaml:1:1"),
        ("script: train.py\nguards: {world_size: any}", "expected strict, elastic or off, found"),
        ("script: !!python/name:os.system train.py", "script: the YAML tag"),
        ("? [a]\n: b\nscript: train.py", "expected every key to be a word"),
    ],
)
def test_what_is_impossible_is_refused_with_its_place(text: str, problem: str) -> None:
    lines = problems(text)
    assert len(lines) == 1
    assert problem in lines[0]
    assert lines[0].startswith("job.yaml:")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "job.yaml:1:1: empty"),
        ("  \n\n", "job.yaml:1:1: empty"),
        ("# nothing yet\n", "job.yaml:1:1: expected a mapping"),
        ("- a\n- b\n", "job.yaml:1:1: expected a mapping"),
        ("script: a\n\tkeep: 1\n", "job.yaml:2:1: not valid YAML: found a tab"),
        ("script: [a\nb: c\n", "job.yaml:2:2: not valid YAML"),
        ("script: *a\n", "job.yaml:1:9: not valid YAML: found undefined alias 'a'"),
        ("script: a\n---\nscript: b\n", "job.yaml:2:1: not valid YAML: expected a single"),
        ("script: a\nname: a\x01b\n", "job.yaml:2:8: not valid YAML: found the character #x0001"),
        ("script: " + "[" * 5000, "job.yaml: not valid YAML: nested too deeply"),
        ("a: &a [*a]\n", "too many values, or nested too deeply"),
        (b"script: caf\xe9.py\n", "job.yaml:1:12: not UTF-8: found byte 0xe9"),
        (
            b"#" * (1 << 20) + b"\nscript: train.py\n",
            "job.yaml: no job file: expected at most 1048576 bytes",
        ),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_clearly(content: str | bytes, problem: str) -> None:
    (line,) = problems(content)
    assert problem in line


def test_aliases_work_but_cannot_explode() -> None:
    assert job("script: train.py\nargs: [&a x, *a]").args == ("x", "x")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    (line,) = problems(bomb)
    assert "too many values" in line


def test_a_missing_file_and_a_directory_are_told_apart(home: Path) -> None:
    (home / "job.yaml").touch()
    with pytest.raises(UsageError, match=r"jop\.yaml: no such file: /.*did you mean 'job\.yaml'"):
        load("jop.yaml")
    with pytest.raises(UsageError, match="expected a job file, found a directory"):
        load(home)


def test_numbers_in_texts_stay_as_they_were_written() -> None:
    loaded = job("script: train.py\nname: 007\nargs: [010, 1e-3, 1.50, -2]\nenv: {A: 0x10, NO: 1}")
    assert loaded.name == "007"
    assert loaded.args == ("010", "1e-3", "1.50", "-2")
    assert loaded.env == {"A": "0x10", "NO": "1"}


def test_off_need_not_be_quoted() -> None:
    loaded = job(
        "script: train.py\nguards: {model: off, world_size: 'off'}\ncheckpoint: {compress: off}"
    )
    assert (loaded.guards.model, loaded.guards.world_size) == ("off", "off")
    assert loaded.checkpoint.compress == "off"


def test_a_section_without_content_is_as_if_absent() -> None:
    assert job("script: train.py\ncheckpoint:\nrestart:\n  backoff:\n") == job("script: train.py")


def test_steps_alone_switch_the_default_seconds_off() -> None:
    every = job("script: train.py\ncheckpoint: {every: {steps: 20}}").checkpoint.every
    assert (every.steps, every.seconds) == (20, None)


def test_paths_are_relative_to_the_job_file_and_expanded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATA", str(home / "data"))
    monkeypatch.setenv("USER_NAME", "me")
    (home / "src").mkdir()
    (home / "src/go.py").touch()
    job("workdir: src\nscript: go.py\nrun_dir: ~/out\ncheckpoint: {dir: '${DATA}/$USER_NAME'}")
    monkeypatch.chdir(home / "src")
    loaded = load(Path("../job.yaml"))
    assert loaded.workdir == home / "src"
    assert loaded.script == home / "src/go.py"
    assert loaded.run_dir == home / "out"
    assert loaded.checkpoint.dir == home / "data/me"


def test_a_module_is_found_from_the_working_directory_without_running_its_parents(
    home: Path,
) -> None:
    (home / "pkg").mkdir()
    (home / "pkg/__init__.py").write_text("raise SystemExit('imported')")
    (home / "pkg/train.py").touch()
    assert job("module: pkg.train").module == "pkg.train"
    (line,) = problems("module: pkg.trian")
    assert line.startswith(f"job.yaml:1:9: module: no module named 'pkg.trian' in {home}")


def test_pythonpath_of_the_job_counts_when_modules_are_looked_up(home: Path) -> None:
    (home / "lib").mkdir()
    (home / "lib/extra_module.py").touch()
    text = "script: train.py\npreload: [extra_module]\n"
    assert len(problems(text)) == 1
    assert job(text + "env: {PYTHONPATH: lib}").preload == ("extra_module",)


def test_overrides_replace_and_add(home: Path) -> None:
    loaded = job(
        "script: gone.py\ncheckpoint: {keep: 1}",
        "checkpoint.every.steps=50",
        "checkpoint.keep=5",
        "script=train.py",
        "args=[--lr, 010]",
        "env.MODE=fast",
        "heartbeat.timeout=90s",
    )
    assert loaded.checkpoint.every.steps == 50
    assert loaded.checkpoint.keep.last == 5
    assert loaded.script == home / "train.py"
    assert loaded.args == ("--lr", "010")
    assert loaded.env == {"MODE": "fast"}
    assert loaded.heartbeat.timeout == 90


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("foo", "expected KEY=VALUE, such as checkpoint.keep=5"),
        ("a..b=1", "expected KEY=VALUE, such as checkpoint.keep=5"),
        ("checkpoint.evry=5", "checkpoint.evry: unknown key, did you mean 'every'?"),
        ("checkpoint.keep=no", "checkpoint.keep: expected a whole number ≥ 1 or a mapping such as "
         "{last: 3, for: 2d}, found false"),
        ("checkpoint.keep.x=1", "checkpoint.keep.x: unknown key"),
        ("checkpoint={evry: 5}", "checkpoint.evry: unknown key, did you mean 'every'?"),
        ("name=[", "not valid YAML: while parsing a flow node expected the node content, "
         "but found '<stream end>'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(override: str, problem: str) -> None:
    assert problems("script: train.py", override) == [f"--set {override}: {problem}"]


def test_what_is_dumped_loads_as_the_same_job() -> None:
    (Path("a.json")).touch()
    loaded = job(
        "module: json.tool\nargs: ['1', x]\nenv: {A: 'yes', MASTER_PORT: 29500}\n"
        "guards: {model: off, config_files: [a.json], free_disk: 500MB}\n"
        "restart: {backoff: 250ms, grace: 0.0001}\n"
        "checkpoint: {every: {steps: 5, seconds: 1h}, keep: {for: 2d, best: {n: 2}}, timeout: 5m,\n"
        "  rename: {a.b: c.d}, strict: false, replicas: [s3://bucket/here, there], commit: all}\n"
    )
    assert loaded.env["MASTER_PORT"] == "29500"
    values = json.loads(json.dumps(dump(loaded)))
    assert values["checkpoint"]["every"] == {"steps": 5, "seconds": "1h"}
    assert values["checkpoint"]["keep"]["for"] == "2d"
    assert from_snapshot(values) == loaded
    assert job(yaml.safe_dump(values)) == loaded


@pytest.mark.parametrize("every", ["auto", "{seconds: auto}", "{steps: 7, seconds: auto}"])
def test_what_is_decided_automatically_is_dumped_as_such(every: str) -> None:
    loaded = job(f"script: train.py\ncheckpoint: {{every: {every}}}")
    assert loaded.checkpoint.every.seconds == "auto"
    assert from_snapshot(json.loads(json.dumps(dump(loaded)))) == loaded


def test_a_job_of_the_first_version_still_loads() -> None:
    values = dump(job("script: train.py"))
    first = {"dir": "/ckpt", "every": {"steps": None, "seconds": "5m"}, "keep": 4}
    assert from_snapshot({**values, "checkpoint": first}).checkpoint.keep.last == 4


def test_a_snapshot_outlives_its_script_and_is_not_expanded(home: Path) -> None:
    values = dump(job("script: train.py")) | {"run_dir": "/tmp/$NOT_SET"}
    (home / "train.py").unlink()
    assert str(from_snapshot(values).run_dir) == "/tmp/$NOT_SET"


def test_a_snapshot_of_another_version_is_refused_by_its_keys() -> None:
    values = dump(job("script: train.py"))
    with pytest.raises(UsageError, match=r"run directory: later: unknown key"):
        from_snapshot(values | {"later": 1})
    del values["run_dir"]
    with pytest.raises(UsageError, match=r"here: run_dir: missing"):
        from_snapshot(values, "here")


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Job.model_fields, "dir", "every", "steps", "seconds", "é"]),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_no_yaml_gets_more_than_a_job_or_a_refusal_that_names_its_place(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    lines: list[str] = []
    try:
        job(text)
    except UsageError as refused:
        lines = refused.message.splitlines()
    assert all(line.startswith("job.yaml") for line in lines)


def test_reading_a_job_needs_no_torch_and_no_user_interface() -> None:
    code = (
        "import sys, autoglm_resume.job.load;"
        "sys.exit(str({'torch', 'rich', 'typer', 'numpy'} & set(sys.modules) or '') or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
