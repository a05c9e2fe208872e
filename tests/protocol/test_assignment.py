"""The contract with torchrun, compared with the real one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.store.retention import KeepBest, KeepRules
from autoglm_resume.protocol.assignment import (
    ASSIGNMENT,
    Assignment,
    Checkpointing,
    ResumePoint,
    Source,
    shared_environment,
)
from autoglm_resume.supervise.ranks.torchrun import torchrun_exits, torchrun_log
from tests.patience import PATIENCE

texts = st.text(max_size=10)
assignments = st.builds(
    Assignment,
    run_id=texts,
    attempt=st.integers(0),
    world_size=st.integers(1),
    master_addr=texts,
    master_port=st.integers(1, 65535),
    agent_store=st.booleans(),
    max_restarts=st.integers(0),
    supervisor=st.integers(1),
    directory=st.just("/d"),
    board=texts,
    source=st.builds(
        Source,
        script=st.none() | texts,
        module=st.none() | texts,
        args=st.lists(texts).map(tuple),
        workdir=texts,
    ),
    checkpoint=st.builds(
        Checkpointing,
        dir=texts,
        every_steps=st.none() | st.integers(1),
        keep=st.builds(
            KeepRules,
            last=st.integers(1),
            every_steps=st.none() | st.integers(1),
            best=st.none() | st.builds(KeepBest, metric=texts),
            for_seconds=st.none() | st.floats(1, 1e9),
        ),
        memory=st.integers(0, 2),
        options=st.builds(SaveOptions, compress=st.sampled_from(["auto", "off"])),
        rename=st.dictionaries(texts, texts),
        strict=st.booleans(),
    ),
    resume=st.none() | st.builds(ResumePoint, id=texts, step=st.integers(0), digest=texts),
    savers=st.lists(texts).map(tuple),
    check_model=st.booleans(),
    config_files=st.lists(texts).map(tuple),
    environment=st.dictionaries(texts, texts),
)


@given(assignments)
def test_an_assignment_comes_back_from_its_file_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, assignment: Assignment
) -> None:
    file = tmp_path_factory.getbasetemp() / "assignment.json"
    file.write_bytes(assignment.to_json())
    assert Assignment.load(file) == assignment


class Launched(NamedTuple):
    code: int
    environment: dict[str, str]
    said: str
    pid: int


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A real torchrun of one rank, which writes down its environment and exits with 3."""
    directory = tmp_path_factory.mktemp("torchrun")
    script = directory / "script.py"
    script.write_text(
        "import json, os, sys\n"
        f"open({str(directory / 'environment')!r}, 'w').write(json.dumps(dict(os.environ)))\n"
        f"open({str(directory / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "sys.exit(3)\n"
    )
    mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={k: v for k, v in os.environ.items() if k not in mine and "TORCHELASTIC" not in k},
    )
    environment = json.loads((directory / "environment").read_text())
    return Launched(
        done.returncode,
        environment,
        done.stderr + done.stdout,
        int((directory / "pid").read_text()),
    )


def assignment(**changes: Any) -> Assignment:
    values: dict[str, Any] = {
        "run_id": "run",
        "attempt": 0,
        "world_size": 1,
        "master_addr": "127.0.0.1",
        "master_port": 1,
        "agent_store": True,
        "max_restarts": 0,
        "supervisor": 1,
        "directory": "/d",
        "board": "",
        "source": Source("x", None, (), "/"),
        "checkpoint": Checkpointing(""),
        "resume": None,
        "check_model": True,
    }
    return Assignment(**{**values, **changes})


def test_ranks_find_every_variable_that_torchrun_sets(
    torchrun: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    given_ = {**shared_environment(1), **assignment().rank_environment(0)}
    theirs = {
        name: value
        for name, value in torchrun.environment.items()
        if os.environ.get(name) != value
        # Of pytest and the shell, which torchrun did not set.
        and name not in ("PYTEST_CURRENT_TEST", "_", "SHLVL", "PWD", "OLDPWD", "LC_CTYPE")
    }
    # Which signals torchrun itself passes on: an option of its own that leaks to the ranks.
    theirs.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
    assert "TORCHELASTIC_RUN_ID" in theirs
    assert set(theirs) - set(given_) == set()
    assert set(given_) - set(theirs) - {ASSIGNMENT} == set()
    place = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}
    different = {n for n in theirs if n not in place and theirs[n] != given_[n]}
    assert different == set()


def test_every_rank_finds_its_own_numbers() -> None:
    base = assignment(
        attempt=4,
        world_size=3,
        master_addr="h",
        master_port=5,
        max_restarts=9,
        agent_store=False,
    )
    one = dataclasses.replace(base, environment={"MINE": "x", "RANK": "no"}).rank_environment(2)
    assert (one["RANK"], one["LOCAL_RANK"], one["ROLE_RANK"]) == ("2", "2", "2")
    assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["ROLE_WORLD_SIZE"]) == ("3", "3", "3")
    assert (one["TORCHELASTIC_RESTART_COUNT"], one["TORCHELASTIC_MAX_RESTARTS"]) == ("4", "9")
    assert (one["MASTER_ADDR"], one["MASTER_PORT"], one["MINE"]) == ("h", "5", "x")
    assert one["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    files = {path(n) for n in range(3) for path in (base.log, base.events, base.error)}
    assert len(files) == 9


def test_what_the_user_set_is_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shared_environment(2)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in shared_environment(1), "as torchrun"
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert "OMP_NUM_THREADS" not in shared_environment(2)


def test_exit_codes_are_read_from_what_torchrun_really_says(
    torchrun: Launched, tmp_path: Path
) -> None:
    base = assignment(directory=str(tmp_path))
    assert torchrun.code == 1
    assert torchrun_exits(base) == {}
    torchrun_log(base).write_text(torchrun.said)
    assert torchrun_exits(base) == {torchrun.pid: 3}
    torchrun_log(base).write_text(
        torchrun.said.replace("exitcode  : 3", "exitcode  : -9") + "\n  exitcode  : 1 (pid: 77)\n"
    )
    assert torchrun_exits(base) == {torchrun.pid: -9, 77: 1}
