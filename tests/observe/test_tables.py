from __future__ import annotations

import io
import re

import pytest

from autoglm_resume.observe.tables import Table, terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def table() -> Table:
    made = Table(("name", "step"), right=frozenset([1]))
    made.add("a", 7)
    made.add("longer", None)
    made.add("\x1b[2Jbad", 100)
    return made


def test_plain_tables_are_aligned_and_clean() -> None:
    stream = io.StringIO()
    table().print(stream)
    assert stream.getvalue() == "name    step\na          7\nlonger\nbad      100\n"


def test_terminals_get_the_same_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    table().print(stream)
    assert "longer" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_columns_can_be_picked_and_keep_their_alignment() -> None:
    assert table().only(1).lines() == ["step", "   7", "", " 100"]
    assert table().fits(13)
    assert not table().fits(12)


def test_digests_are_never_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    facts = Table()
    facts.add("final model", "blake3:" + "ab" * 32)
    stream = Terminal()
    facts.print(stream)
    assert stream.getvalue() == f"final model  blake3:{'ab' * 32}\n"


def test_a_long_path_leaves_room_for_what_is_wrong_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    findings = Table(("what", "found", "verdict", "what to do"))
    findings.add(f"replica /{'mnt/storage/' * 7}", "no answer", "warning", "look at the network")
    stream = Terminal()
    findings.print(stream)
    lines = re.sub(r"\x1b\[\d*m", "", stream.getvalue()).splitlines()
    assert any(" warning " in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert len(lines) < 10


def test_an_empty_table_is_its_headers() -> None:
    assert Table(("a", "b")).lines() == ["a  b"]
    assert Table().lines() == []


def test_a_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not terminal(stream)
