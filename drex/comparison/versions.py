"""Date and versions, for whatever is measured or simulated. Imports nothing that takes long."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def versions() -> dict[str, Any]:
    """Date, and versions of what numbers depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "transformers", "drex", "vllm")},
            "git_commit": git_commit(),
        },
    }


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit that was measured, marked where files differ from it; None outside of a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "drex") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
