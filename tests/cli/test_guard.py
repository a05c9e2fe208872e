from __future__ import annotations

import pytest

from autoglm_resume import errors
from autoglm_resume.cli.guard import guarded


def code_of(command: object) -> int:
    with pytest.raises(SystemExit) as ended:
        guarded(command)()  # type: ignore[arg-type]
    assert isinstance(ended.value.code, int)
    return ended.value.code


def raising(error: BaseException) -> object:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.AutoglmError, 1),
        (errors.UsageError, 2),
        (errors.Interrupted, 75),
        (errors.RunLocked, 76),
        (errors.CheckpointError, 90),
        (errors.NoAcceptableCheckpoint, 90),
        (errors.DoNotRequeue, 93),
    ],
)
def test_every_error_has_its_exit_code_and_its_hint(
    kind: type[errors.AutoglmError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(kind("what is wrong", hint="what to do"))) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "autoglm: error: what is wrong\nautoglm: hint: what to do\n"


def test_an_error_repeats_neither_logins_nor_what_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert code_of(raising(errors.UsageError("s3://me:secret@b: no \x1b[2J\u202ebucket"))) == 2
    assert capsys.readouterr().err == "autoglm: error: s3://…@b: no bucket\n"


def test_what_a_command_returns_is_its_exit_code() -> None:
    assert code_of(lambda: 75) == 75


def test_ctrl_c_exits_130() -> None:
    assert code_of(raising(KeyboardInterrupt())) == 130


def test_an_error_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(raising(PermissionError(13, "Permission denied", "/etc/shadow"))) == 1
    assert capsys.readouterr().err == "autoglm: error: /etc/shadow: Permission denied\n"


def test_what_is_our_own_fault_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(raising(ZeroDivisionError()))()  # type: ignore[arg-type]
