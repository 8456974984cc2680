"""Entry point: collects the subcommands and turns bad input into one clear line and exit code 2."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from drex.cli.advise import advise
from drex.cli.bench import bench
from drex.cli.evaluate import evaluate
from drex.cli.generate import generate
from drex.cli.info import info
from drex.cli.profile import profile
from drex.cli.serve import serve
from drex.cli.simulate import simulate
from drex.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(generate)
app.command()(info)
app.command()(train)
app.command()(evaluate)
app.command()(profile)
app.command()(bench)
app.command()(simulate)
app.command()(serve)
app.command()(advise)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"drex {version('drex')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Early-exit language models with dynamic rebatching."""


def main() -> None:
    """Run the command line; a ValueError from the library is the user's input, said in one line."""
    # transformers draws a bar for every folder it reads; drex has its own for what takes long.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except ValueError as error:
        sys.stderr.write(f"drex: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
