"""The command `ncvsd`: one file a command, all on the public API."""

import io
import sys
import warnings
from typing import Annotated, TextIO

import typer

from ncvsd_inverse import CheckpointError, DivergenceError, __version__
from ncvsd_inverse.cli import (
    convert,
    demo,
    distill,
    encode,
    evaluate,
    priors,
    solve,
    statistics,
    train,
)
from ncvsd_inverse.plain_data import printable

__all__ = ["app", "main"]

app = typer.Typer(
    help="Restore images with distilled generative denoisers as priors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("solve")(solve.solve)
app.command("priors")(priors.priors)
app.command("convert")(convert.convert)
app.command("statistics")(statistics.statistics)
app.command("evaluate")(evaluate.evaluate)
app.command("train")(train.train)
app.command("distill")(distill.distill)
app.command("encode")(encode.encode)


def main() -> None:
    """Run the command; an expected error becomes one line on standard error and exit status 1."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        app()
    except (ValueError, TypeError, ImportError, CheckpointError, DivergenceError, OSError) as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as a line on standard error, without where it comes from."""
    typer.echo(f"warning: {printable(str(message))}", err=True)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
