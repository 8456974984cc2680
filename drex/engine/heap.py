"""Python's garbage collector while an engine serves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """Within, the collector passes over all that exists by now, torch's modules and the weights' foremost.

    It walks through them again and again otherwise, since serving makes many small objects: a fifth of the engine's own
    time. What is made within is collected as ever, and at the end all is as before. A heap that is frozen already is
    left alone.
    """
    ours = not gc.get_freeze_count()
    try:
        if ours:
            gc.freeze()
        yield
    finally:
        if ours:
            gc.unfreeze()
