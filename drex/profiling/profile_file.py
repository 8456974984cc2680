"""The file of a cost profile."""

from __future__ import annotations

import json
from pathlib import Path

from drex.control.cost.profile import Profile
from drex.text_files import read_text


def load_profile(path: str | Path) -> Profile:
    """Read a profile's file. Raises ValueError if it is none."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as a profile ({error}): make one with `drex profile`") from error
    return Profile.from_dict(data)
