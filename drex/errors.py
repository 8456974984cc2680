"""What is raised for a setting that can't be followed."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting that can't be followed.

    Args:
        field: its name, as users write it; where it is in an object, the object's.
        message: what is wrong with it, and what to do about it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
