"""A `drex serve` process for the scripts beside this file."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drex.testing.byte_fallback import write_byte_fallback_model

READY_SECONDS = 120
BYTE_LEVEL, BYTE_FALLBACK = "byte-level", "byte-fallback"


@dataclass(frozen=True)
class Served:
    """A server: where it is, and its process, if it is one of ours."""

    address: str
    process: subprocess.Popen[bytes] | None = None

    def metric(self, name: str, labels: str = "") -> float:
        """The value of a metric; `labels` is a part of what its line has between braces.

        Raises:
            ValueError: there is none.
        """
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        for line in lines:
            found = re.fullmatch(r"([^{\s]+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and labels in (found[2] or ""):
                return float(found[3])
        raise ValueError(f"{self.address} has no metric {name} with {labels!r}: is it a drex server?")

    def resident(self) -> tuple[float, float]:
        """Bytes of the process that are in memory: all but the K/V pool, and the pool.

        The pool is the largest anonymous mapping. Of a server elsewhere all of it counts as the first.
        """
        if self.process is None:
            return self.metric("process_resident_memory_bytes"), 0.0
        text = Path(f"/proc/{self.process.pid}/smaps").read_text()
        total, pool, largest, anonymous = 0.0, 0.0, 0, False
        for line in text.splitlines():
            if header := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+\s*(.*)", line):
                anonymous = header[1] == "rw-p" and not header[2]
            elif size := re.match(r"Size:\s+(\d+) kB", line):
                anonymous, largest = anonymous and int(size[1]) > largest, max(largest, int(size[1]) * anonymous)
            elif rss := re.match(r"Rss:\s+(\d+) kB", line):
                total += 1024.0 * int(rss[1])
                pool = 1024.0 * int(rss[1]) if anonymous else pool
        return total - pool, pool


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server a script is about, for `server_of`."""
    parser.add_argument("--url", help="A server that runs already, as http://127.0.0.1:8000.")
    parser.add_argument(
        "--tokenizer-kind",
        choices=(BYTE_LEVEL, BYTE_FALLBACK),
        default=BYTE_LEVEL,
        help="Of the model that is served without --url: byte-level is the bundled model, byte-fallback a tiny random "
        "Llama with a tokenizer like Llama 2's.",
    )


@contextlib.contextmanager
def server_of(given: argparse.Namespace, *options: str) -> Iterator[Served]:
    """The server at `--url`, or else one with these options around a model with the kind of tokenizer that is given."""
    if given.url is not None:
        yield Served(given.url)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.tokenizer_kind == BYTE_FALLBACK:
            write_byte_fallback_model(Path(folder))
            options = (folder, *options)
        with served(*options) as server:
            yield server


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    """A server with these options, on a port that it finds itself; told to stop at the end, which it must do well.

    Raises:
        RuntimeError: it did not start, or ended with an error.
    """
    drex = Path(sys.executable).with_name("drex")
    env = {**os.environ, "DREX_CHECK_INTEGRITY": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([drex, "serve", "--port", "0", *options], stdout=log, stderr=log, env=env)

        def said() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            end = time.monotonic() + READY_SECONDS
            while not (found := re.search(r"http://[0-9.:]+\d", said())):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start:\n{said()[-2000:]}")
                time.sleep(0.1)
            yield Served(found[0], process)
            process.terminate()
            if process.wait(60):
                raise RuntimeError(f"the server ended with code {process.returncode}:\n{said()[-2000:]}")
        finally:
            process.kill()
            process.wait()
