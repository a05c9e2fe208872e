"""What all programs in scripts/bench promise: their options, their JSON, their exit code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
PROGRAMS = sorted(path for path in BENCH.iterdir() if path.is_file() and not path.suffix)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    from lib import common

    return common


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_program_says_what_it_does_without_an_environment(program: Path) -> None:
    # -S: nothing but the standard library, as of a python3 in which nothing is installed.
    command = [sys.executable, "-S", program, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env={})
    assert shown.returncode == 0, shown.stderr
    assert all(option in shown.stdout for option in ("--quick", "--seed", "--json"))
    assert program.stat().st_mode & 0o111


SOURCES = [*PROGRAMS, *sorted(BENCH.glob("*/*.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_what_a_program_takes_from_the_package_is_there(source: Path) -> None:
    # Most of it is imported late, where no check of names would look.
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autoglm_resume"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                assert hasattr(module, name.name) or importlib.util.find_spec(submodule)


@pytest.mark.parametrize(("measured", "code"), [(2.0, 0), (3.5, 1)])
def test_a_failed_check_is_written_down_and_is_exit_code_1(
    common: ModuleType, tmp_path: Path, measured: float, code: int
) -> None:
    report = common.Report("sample", rounds=[{"round": 1}], results={"x": measured})
    report.checks = [common.Check.at_most("x", measured, 3, "us")]
    with pytest.raises(SystemExit) as ended:
        report.finish(tmp_path / "new" / "found.json")
    assert ended.value.code == code
    written = json.loads((tmp_path / "new" / "found.json").read_text())
    assert {"machine", "rounds", "results", "checks"} <= written.keys()
    assert written["checks"] == [
        {"name": "x", "measured": measured, "required": 3, "unit": "us", "ok": code == 0}
    ]
    assert written["machine"]["cores"] >= 1


def test_another_checkout_has_to_be_set_up(common: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="scripts/setup-venv"):
        common.python_of(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert common.python_of(tmp_path) == str(python)
    assert common.autoglm(str(python))[0] == str(python)


def test_lines_that_a_kill_cut_short_are_left_out(common: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    lines = common.Lines(file)
    assert lines.new() == []
    file.write_text('{"n": 1}\n{"n": \n{"n": 2}\n{"n": 3')
    assert [line["n"] for line in lines.new()] == [1, 2]
    with file.open("a") as more:
        more.write("}\n")
    assert [line["n"] for line in lines.new()] == [3]
    assert len(lines.all) == 3
