"""What a benchmark's numbers depend on besides drex: machine, date, versions, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from drex.compute.device import device_name, has_fast_bfloat16

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def describe() -> dict[str, Any]:
    """Machine, date and versions, for the JSON beside every number."""
    return {
        **versions(),
        "machine": {
            "cpu": device_name(torch.device("cpu")),
            "device": device_name(torch.device("cuda")) if torch.cuda.is_available() else None,
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "fast_bfloat16": has_fast_bfloat16(torch.device("cpu")),
            "system": platform.platform(),
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "environment": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        },
    }


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
