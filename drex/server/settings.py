"""How a server is run: addresses, keys and limits. Frozen; read once at the start."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drex.text_files import read_text

KEYS_VARIABLE = "DREX_API_KEY"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server; times in seconds.

    Args:
        served_names: of the model, the first of which is used in replies.
        api_keys: any of which opens guarded paths; empty: all are open.
        max_body_bytes: of a request.
        max_queue: requests that may wait beyond those in flight; with more, 429.
        request_timeout: for one request from its body on, delivery included.
        body_timeout: for a request's headers to come, then its body, and for a client to take each piece of a stream.
        shutdown_timeout: for what is open when the server is told to stop.
        allowed_origins: of browsers' pages elsewhere that may use the server; `*` is any.
        log_prompts: write prompts to the log.

    Raises:
        ValueError: a value out of range.
    """

    served_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_queue: int = 1024
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    shutdown_timeout: float = 25.0
    allowed_origins: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.served_names or not all(self.served_names):
            raise ValueError("--served-model-name is empty: give a name, or leave it out")
        for name, least in (("max_body_bytes", 1), ("max_queue", 0), ("shutdown_timeout", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least {least}")
        for name in ("request_timeout", "body_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give seconds above 0")


class Keys:
    """API keys, held as digests; looking one up takes as long whichever it is, and whether it is there."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether it is one of the keys."""
        given = _digest(key)
        # All are compared: stopping at the first would tell which it was.
        return sum([hmac.compare_digest(given, known) for known in self._digests]) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """All keys: from options, from a file with one a line, and from the environment (DREX_API_KEY, commas between).

    Raises:
        ValueError: a file that can't be read or has no keys, or an empty key.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = read_text(file).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file {file} can't be read ({error}): name a text file") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"--api-key-file {file} has no keys: put one on each line")
        keys += found
    if KEYS_VARIABLE in os.environ:
        keys += [key.strip() for key in os.environ[KEYS_VARIABLE].split(",")]
    if not all(keys):
        raise ValueError(f"an API key is empty: give some text, or unset {KEYS_VARIABLE}")
    return tuple(dict.fromkeys(keys))
