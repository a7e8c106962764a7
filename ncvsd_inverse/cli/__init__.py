"""The command `ncvsd`: one file a command, all on the public API."""

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import torch
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
from ncvsd_inverse.cli.app import app as serve_page
from ncvsd_inverse.cli.examples import examples_text
from ncvsd_inverse.plain_data import printable

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
app.command("app", epilog=examples_text("app"))(serve_page)
app.command("doctor", epilog=examples_text("doctor"))(doctor.doctor)


def main() -> None:
    """Run the command; an expected error becomes one line on standard error.

    The exit status is 2 for a command line that names no command or option, else 1.
    """
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        if message := _describe_usage(error, sys.argv[1:]):
            _echo_error(message)
        sys.exit(2)
    except typer.Abort:
        _echo_error("stopped")
        sys.exit(1)
    except RuntimeError as error:
        if not isinstance(error, EXPECTED) and "can't allocate memory" not in str(error):
            raise
        _echo_error(str(error))
        sys.exit(1)
    except EXPECTED as error:
        _echo_error(str(error) or type(error).__name__)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


EXPECTED: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, ImportError, OSError, MemoryError, torch.OutOfMemoryError),
    *(CheckpointError, DivergenceError),
)
"""Errors that tell a user what is wrong; others are our own and keep their traceback."""

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports its heirs alone


def _echo_error(message: str) -> None:
    typer.echo(f"error: {printable(' '.join(message.split()))}", err=True)


def _describe_usage(error: Exception, words: Sequence[str]) -> str:
    """Return what is wrong with the words of a command line, and which value came."""
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: help was asked for
        typer.echo(message, nl=bool(message))
        return ""
    came = ""
    if isinstance(error, typer.BadParameter) and error.param is not None:
        for word, after in zip(words, [*words[1:], ""], strict=True):
            option, has_value, value = word.partition("=")
            if option in error.param.opts:
                came = value if has_value else after
    return message if not came or came in message else f"{message.rstrip('.')}, got {came!r}"


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
