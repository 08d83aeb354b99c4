"""The ``fdconv`` command.

Each command is a file of `fdconv_deploy.cli` and imports what it needs when it runs, so
that ``fdconv --help`` is instant and segmenting or serving loads no torch. Exit codes: 0 done,
1 a mistake that the message explains, 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperCommand, TyperGroup

from fdconv_deploy.cli.bench import bench
from fdconv_deploy.cli.build import build
from fdconv_deploy.cli.convert import convert
from fdconv_deploy.cli.demo import demo
from fdconv_deploy.cli.doctor import doctor
from fdconv_deploy.cli.evaluate import evaluate
from fdconv_deploy.cli.export import export
from fdconv_deploy.cli.inspect import inspect
from fdconv_deploy.cli.segment import segment
from fdconv_deploy.cli.serve import serve
from fdconv_deploy.cli.stopping import unwinding_when_stopped
from fdconv_deploy.cli.verify import verify
from fdconv_deploy.errors import FDConvError, UsageError
from fdconv_deploy.version import __version__

# What an option's value is called in the help, where the option gives it no name of its own.
_VALUES = {bool: "", int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def _name_values(parameters: list[Any]) -> list[Any]:
    """Names for their values in the help, as people say them, instead of their Python types."""
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):  # its own name says what it is
            setattr(parameter, "display_type_rich", lambda ctx: None)  # noqa: B010
        elif parameter.metavar is None:
            kind = getattr(parameter, "type_descriptor", None)
            kinds = [kind and kind.annotation, *get_args(kind and kind.annotation)]
            parameter.metavar = next((_VALUES[one] for one in kinds if one in _VALUES), None)
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        return _name_values(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _name_values(super().get_params(ctx))


app = typer.Typer(
    cls=_Group,
    help="Export, verify, run, time and serve FDConv networks: segmentors and detectors.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fdconv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


_WORK = (inspect, convert, export, verify, build, segment, evaluate, bench, serve)
for _command in (*_WORK, demo, doctor):
    app.command(cls=_Command)(_command)


def _message(error: Exception) -> str:
    """The sentence that explains a user's mistake; other errors are raised again."""
    if isinstance(error, FDConvError):
        return error.command_line or str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}. Give another path, or free that one."
    if isinstance(error, ImportError):
        from fdconv_deploy.environment import missing

        if what := missing(error, "export"):  # what runs bundles says itself which backend lacks it
            return f"this command needs {what}"
    raise error  # a mistake of ours, or a broken installation


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, not in a traceback."""
    try:
        with unwinding_when_stopped():
            app()
    except Exception as error:
        message, code = _message(error), 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    err.print("[bold red]error:[/] ", end="")
    # As it is: a path may look like markup.
    err.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)
    sys.exit(code)
