"""Entry point: collects the subcommands and turns bad input into one clear line and exit code 2."""

from __future__ import annotations

import sys

import typer

from drex.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(train)


@app.callback()
def root() -> None:
    """Early-exit language models, served with dynamic rebatching."""


def main() -> None:
    """Run the command line; ValueError from the library is the user's input, said in one line."""
    try:
        app()
    except ValueError as error:
        sys.stderr.write(f"drex: {error}\n")
        sys.exit(2)
