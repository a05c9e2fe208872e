"""The `autoglm` command. Importing it must stay cheap: everything heavy is imported by the command
that needs it, when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import __version__, output
from autoglm_resume.cli import (
    ckpts,
    doctor,
    explain,
    export,
    import_,
    inspect,
    logs,
    mv,
    prune,
    resume,
    run,
    runs,
    save,
    schema,
    slurm,
    status,
    stop,
    verify,
)
from autoglm_resume.cli.guard import guarded
from autoglm_resume.cli.light import Command, CommandGroup, PassingCommand

app = typer.Typer(
    name="autoglm",
    cls=CommandGroup,
    help="torchrun that survives: launches your training, notices every way it can die, and "
    "brings it back from the latest checkpoint that was proven good.",
    epilog="Data goes to standard output, everything else to standard error. Exit codes: 0 done, "
    "1 failed for good, 2 wrong usage, 75 interrupted with a checkpoint saved (run it again), "
    "76 another supervisor has the run, 90 no acceptable checkpoint, 93 do not requeue, "
    "128+N died by signal N.",
    add_completion=False,
    no_args_is_help=True,
    # rich would double the time of --help, and its tracebacks hide ours.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        output.show(f"autoglm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None: ...


_inspect = typer.Typer(
    cls=CommandGroup, help="Look into files that autoglm wrote.", no_args_is_help=True
)
_inspect.command(
    "ckpt",
    cls=Command,
    epilog=inspect.EXAMPLES,
    options_metavar=inspect.USAGE,
    context_settings=inspect.SETTINGS,
)(guarded(inspect.ckpt))

_slurm = typer.Typer(cls=CommandGroup, help="Run a job under Slurm.", no_args_is_help=True)
_slurm.command("submit", cls=Command, epilog=slurm.EXAMPLES)(guarded(slurm.submit))

app.command("run", cls=PassingCommand, epilog=run.EXAMPLES)(guarded(run.run))
app.command("resume", cls=Command, epilog=resume.EXAMPLES)(guarded(resume.resume))
app.command("status", cls=Command, epilog=status.EXAMPLES)(guarded(status.status))
app.command("runs", cls=Command, epilog=runs.EXAMPLES)(guarded(runs.runs))
app.command("explain", cls=Command, epilog=explain.EXAMPLES)(guarded(explain.explain))
app.command("logs", cls=Command, epilog=logs.EXAMPLES)(guarded(logs.logs))
app.command("save", cls=Command, epilog=save.EXAMPLES)(guarded(save.save))
app.command("stop", cls=Command, epilog=stop.EXAMPLES)(guarded(stop.stop))
app.command("doctor", cls=Command, epilog=doctor.EXAMPLES)(guarded(doctor.doctor))
app.add_typer(_slurm, name="slurm")
app.command("ckpts", cls=Command, epilog=ckpts.EXAMPLES)(guarded(ckpts.ckpts))
app.command("mv", cls=Command, epilog=mv.EXAMPLES)(guarded(mv.mv))
app.command("prune", cls=Command, epilog=prune.EXAMPLES)(guarded(prune.prune))
app.add_typer(_inspect, name="inspect")
app.command("verify", cls=Command, epilog=verify.EXAMPLES)(guarded(verify.verify))
app.command("export", cls=Command, epilog=export.EXAMPLES)(guarded(export.export))
app.command("import", cls=Command, epilog=import_.EXAMPLES)(guarded(import_.import_))
app.command("schema", cls=Command, epilog=schema.EXAMPLES)(guarded(schema.schema))


def main() -> None:
    """Run the command line; the exit code says what happened (see `errors`)."""
    output.begin()
    try:
        app()
    except Exception as error:
        output.say(f"internal error: {type(error).__name__}: {error}")
        output.say("this is a bug of autoglm; please report it with this traceback")
        raise
