from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume import output
from autoglm_resume.output import Lossy, lines, printable
from tests.patience import PATIENCE


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        ("a\tb", "a\tb"),
        ("\x1b[2J\x1b[Hboo", "boo"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mc1", "31mc1"),
        ("bell\x07\x08\x00", "bell"),
        ("\x1bcreset", "reset"),
        (" 10%|█\r 20%|██\r", " 20%|██"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("cut \x1b[3", "cut "),
        ("evil \u202egnp.exe", "evil gnp.exe"),
        ("\u2066a\u2069\u200fb\u061c", "ab"),
        ("pay\u200bpal\ufeff\U000e0041", "paypal"),
        ("naïve 模型 🙂", "naïve 模型 🙂"),
    ],
)
def test_control_sequences_do_not_reach_the_terminal(raw: str, shown: str) -> None:
    assert printable(raw, colors=False) == shown


def test_colours_of_the_ranks_are_kept_and_ended() -> None:
    assert printable("\x1b[31mred\x1b[2J", colors=True) == "\x1b[31mred\x1b[0m"


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_ever_shown(text: str) -> None:
    shown = lines(text)
    assert shown == lines(shown), "what is safe stays as it is"
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for character in shown.replace("\n", "").replace("\t", ""):
        assert unicodedata.category(character) != "Cc"
        assert unicodedata.bidirectional(character) not in directions


def python(
    code: str, *shell: str, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """A process whose descriptors the words of `shell` redirect."""
    begin = "import sys\nfrom autoglm_resume import output\n"
    words = f'exec "$0" "$@" {" ".join(shell)}'
    return subprocess.run(
        ["bash", "-c", words, sys.executable, "-c", begin + code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("fate", [">/dev/full", ">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_what_becomes_of_output_is_no_concern_of_the_exit_code(fate: str) -> None:
    code = """
output.begin()
for line in range(10_000):
    output.show("a line of some length, so that no buffer holds all of them")
output.say("done")
sys.exit(75)
"""
    done = python(code, fate)
    assert done.returncode == 75
    assert done.stderr == (b"" if "2>" in fate else b"autoglm: done\n")


def test_a_closed_descriptor_is_not_the_next_files_number(tmp_path: Path) -> None:
    code = f"""
output.begin()
journal = open({str(tmp_path / "journal")!r}, "w")
assert journal.fileno() > 2
import os
for fd in (1, 2):
    os.write(fd, b"of a rank")
"""
    assert python(code, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "journal").read_bytes() == b""


def test_a_script_that_says_goodbye_to_a_full_disk_keeps_its_exit_code() -> None:
    code = """
print("what the script itself had printed")
output.say("what a session says")
output.flush()
sys.exit(75)
"""
    assert python(code, ">/dev/full 2>/dev/full").returncode == 75
    assert python(code, "2>/dev/full").stdout == b"what the script itself had printed\n"
    assert python(code, "<&- >&- 2>&-").returncode == 75


def test_what_a_locale_cannot_spell_is_shown_as_well_as_it_can() -> None:
    code = "output.begin(); output.show('caf\\u00e9 \\udcff')"
    shell = "PYTHONIOENCODING=ascii"
    done = subprocess.run(
        ["env", shell, sys.executable, "-c", "from autoglm_resume import output\n" + code],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9 \\udcff\n")


def test_all_reaches_a_reader_who_is_slow_and_shares_a_pipe_that_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "output.begin(); output.show('x' * 300_000)"
    with subprocess.Popen(
        [sys.executable, "-c", "from autoglm_resume import output\n" + code], stdout=writer
    ) as process:
        os.close(writer)
        found = b""
        while piece := os.read(reader, 1000):
            found += piece
        assert process.wait() == 0
    os.close(reader)
    assert found == b"x" * 300_000 + b"\n"


def test_a_reader_who_does_not_read_delays_an_end_no_longer_than_that() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    stream = Lossy(writer)
    stream.patience = 0.01
    assert stream.write(b"x" * 100_000) == 100_000
    assert stream.failure is not None
    os.close(reader)
    os.close(writer)


def test_how_much_is_missing_is_said_where_it_is_missing() -> None:
    reader, writer = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    place = os.dup(full)
    stream = Lossy(place, noting=True)
    stream.write(b"lost\n")
    os.dup2(writer, place)
    stream.write(b"found\n")
    stream.write(b"again\n")
    said = os.read(reader, 1000)
    assert said.startswith(b"\nautoglm: 5 bytes of output were lost here ([Errno 28]")
    assert said.endswith(b")\nfound\nagain\n")
    for fd in (reader, writer, full, place):
        os.close(fd)


def test_a_terminal_that_is_gone_is_no_error() -> None:
    terminal, ours = pty.openpty()
    os.close(terminal)
    stream = Lossy(ours)
    assert stream.write(b"hello") == 5
    assert not stream.isatty() or stream.failure is not None
    os.close(ours)


IN_THE_BACKGROUND = """
import os, pty, signal, sys, termios
leader, terminal = pty.fork()
if leader:
    while True:
        try:
            if not os.read(terminal, 1000):
                break
        except OSError:
            break
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]))
how = termios.tcgetattr(1)
how[3] |= termios.TOSTOP
termios.tcsetattr(1, termios.TCSANOW, how)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
status = os.waitpid(child, os.WUNTRACED)[1]
if os.WIFSTOPPED(status):
    os.kill(child, signal.SIGKILL)
    sys.exit(1)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_what_prints_in_the_background_of_a_terminal_is_not_stopped() -> None:
    code = "from autoglm_resume import output; output.begin(); output.show('x'); output.flush()"
    words = [sys.executable, "-c", IN_THE_BACKGROUND, code]
    assert subprocess.run(words, timeout=PATIENCE).returncode == 0


@pytest.mark.parametrize(
    ("typed", "meant"), [("y", True), ("YES", True), ("", False), ("n", False)]
)
def test_a_question_is_answered_at_the_terminal(
    typed: str, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    person, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin, open(os.ttyname(terminal), "w") as stderr:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stderr", stderr)
        os.write(person, f"{typed}\n".encode())
        assert output.ask("really?") is meant
    os.close(person)


def test_where_nobody_can_be_asked_there_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "answers").open("w+") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert output.ask("really?") is None
    assert output.ask("really?") is None, "it is closed"


def test_a_command_can_be_pasted() -> None:
    assert output.command("stop", Path("my runs/a"), 3) == "autoglm stop 'my runs/a' 3"
