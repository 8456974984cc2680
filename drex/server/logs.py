"""Structured logs on standard error: a line an event, written beside the event loop and the engine.

A log that can't be written, or only slowly, costs lines and nothing else.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any

FORMATS = ("text", "json")
MOST_LINES = 10_000
"""That wait to be written; further ones are dropped."""
LAST_LINES = 2.0
"""Seconds in which what waits can be written at the end."""


class Fields(logging.Formatter):
    """Time, level, logger, message, and the record's own `fields`: as JSON, or as `key=value` for people.

    Args:
        form: one of FORMATS.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            key: value for key, value in getattr(record, "fields", {}).items() if value is not None
        }
        error = self.formatException(record.exc_info) if record.exc_info else None
        if self._json:
            head = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
            return json.dumps({**head, **fields, **({"exception": error} if error else {})})
        said = "".join(f" {key}={json.dumps(value)}" for key, value in fields.items())
        return f"{time} {record.levelname} {record.name}: {record.getMessage()}{said}" + (f"\n{error}" if error else "")


class _Dropping(QueueHandler):
    """Drops lines where the queue is full, instead of waiting or saying so in the log that is stuck."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


class Listener(QueueListener):
    """Writes lines in a thread of its own.

    Args:
        lines: that wait.
        writer: takes them.

    Attributes:
        stuck: whether it did not come to an end: nobody reads what is written, say.
    """

    def __init__(self, lines: queue.Queue[Any], writer: logging.Handler) -> None:
        super().__init__(lines, writer)
        self.stuck = False
        self._lines = lines

    def enqueue_sentinel(self) -> None:
        self._lines.put(None)

    def finish(self) -> None:
        """Write what waits, unless that takes too long."""
        ending = threading.Thread(target=self.stop, daemon=True)
        ending.start()
        ending.join(LAST_LINES)
        self.stuck = ending.is_alive()


@contextmanager
def logging_to_stderr(form: str) -> Iterator[Listener]:
    """Log there for as long as the context is open; raises ValueError for an unknown form.

    Who finds the listener stuck afterwards must leave with `os._exit`: the interpreter's own end waits for its thread.
    """
    if form not in FORMATS:
        raise ValueError(f"--log-format {form!r}: choose one of {', '.join(FORMATS)}")
    # A full disk is no reason to write about it to the same disk.
    logging.raiseExceptions = False
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(Fields(form))
    lines: queue.Queue[Any] = queue.Queue(MOST_LINES)
    listener = Listener(lines, writer)
    handler = _Dropping(lines)
    root = logging.getLogger()
    root.addHandler(handler)
    before, root.level = root.level, logging.INFO
    logging.getLogger("uvicorn.access").disabled = True
    listener.start()
    try:
        yield listener
    finally:
        root.removeHandler(handler)
        root.level = before
        listener.finish()
