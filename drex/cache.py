"""The cache folder: small JSON files in which drex keeps measurements of this machine for its next start.

A file that can't be read counts as absent, and one that can't be written is not kept: neither is a reason to stop.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where files are kept: `$DREX_CACHE`, or drex's folder in the user's cache."""
    chosen = os.environ.get("DREX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drex"


def read_kept(path: Path, what: str) -> Any:
    """The contents of a file, or None; `what` names them in a warning if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring %s in %s: %s", what, path, error)
        return None


def keep(path: Path, contents: Any, what: str) -> None:
    """Write a file at once, so that nobody reads a part of it; `what` names it in a warning if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(contents), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        log.warning("%s was not kept: %s", what, error)
