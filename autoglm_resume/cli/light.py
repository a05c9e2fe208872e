"""typer without what its conversions cost.

Since 0.29 typer imports pydantic (50 ms, as much as typer itself) to convert any value that is not
already a bool. Its own `--help` flag was enough for that in every command: its default was None.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command that imports nothing for its flags."""

    def get_help_option(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """`-h`, `--help`."""
        return _false_by_default(super().get_help_option(ctx))


REST = "autoglm.rest"
"""Where the context of a `PassingCommand` has what stood behind `--`."""


class PassingCommand(Command):
    """A command that passes on what stands behind `--`, and only that."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """All else as ever."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[REST] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """`[-- ARGUMENTS]`."""
        return [*super().collect_usage_pieces(ctx), "[-- ARGUMENTS]"]


class CommandGroup(TyperGroup):
    """A group of commands that imports nothing for its flags."""

    def get_help_option(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """`-h`, `--help`."""
        return _false_by_default(super().get_help_option(ctx))


def _false_by_default(flag: Any) -> Any:
    if flag is not None:
        flag.default = False
    return flag
