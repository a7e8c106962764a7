"""The command `ncvsd`: one file a command, all on the public API."""

import sys
import warnings
from typing import Annotated, TextIO

import typer

from ncvsd_inverse import CheckpointError, DivergenceError, __version__
from ncvsd_inverse.cli import (
    convert,
    demo,
    distill,
    doctor,
    encode,
    evaluate,
    priors,
    solve,
    statistics,
    train,
)
from ncvsd_inverse.cli.examples import examples_text

__all__ = ["app", "main"]

app = typer.Typer(
    help="Restore images with distilled generative denoisers as priors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo", epilog=examples_text("demo"))(demo.demo)
app.command("solve", epilog=examples_text("solve"))(solve.solve)
app.command("priors", epilog=examples_text("priors"))(priors.priors)
app.command("convert", epilog=examples_text("convert"))(convert.convert)
app.command("statistics", epilog=examples_text("statistics"))(statistics.statistics)
app.command("evaluate", epilog=examples_text("evaluate"))(evaluate.evaluate)
app.command("train", epilog=examples_text("train"))(train.train)
app.command("distill", epilog=examples_text("distill"))(distill.distill)
app.command("encode", epilog=examples_text("encode"))(encode.encode)
app.command("doctor", epilog=examples_text("doctor"))(doctor.doctor)


def main() -> None:
    """Run the command; an expected error becomes one line on standard error and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, TypeError, ImportError, CheckpointError, DivergenceError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
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
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
