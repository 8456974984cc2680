"""Files that commands write when their work is done, and open before it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import typer


class OutputFile:
    """A file that is opened before the work whose result it takes, so that a bad path costs no work.

    Until `write`, the file keeps what it held; where there was none, none stays behind if nothing comes to be written.

    Args:
        path: of the file; None: the user wants none.
        option: that named it, as in `--json`.
    """

    def __init__(self, path: Path | None, option: str) -> None:
        self.path, self._option = path, option
        self._file: TextIO | None = None
        self._made = False

    @property
    def wanted(self) -> bool:
        return self.path is not None

    def __enter__(self) -> OutputFile:
        """Open the file; raises ValueError, naming the option, where it can't be written."""
        if self.path is None:
            return self
        self._made = not self.path.exists()
        try:
            # Appending: opening must not empty a report that nothing replaces in the end.
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._refusal(error, "name a file in a folder that you may write to") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told
                self._file.close()
            if self._made and self.path is not None:
                self.path.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        """Replace what the file holds, and say so on standard error; raises ValueError where that fails."""
        assert self._file is not None
        try:
            if self.path is not None and self.path.is_file():  # not a pipe or a device
                self._file.truncate(0)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._refusal(error, "make room, or name another file") from error
        self._made = False
        typer.echo(f"wrote {self.path}", err=True)

    def _refusal(self, error: OSError, remedy: str) -> ValueError:
        return ValueError(f"{self._option} {self.path} can't be written ({error.strerror}): {remedy}")


def output_path(text: str) -> Path:
    """A path that can be written, as the type of an argparse option; one that can't ends a script before its work."""
    path = Path(text)
    try:
        with OutputFile(path, "file"):
            return path
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
