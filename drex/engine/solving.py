"""Yardsticks solved on a thread of their own, on one core, beside the passes of a real model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock

from threadpoolctl import ThreadpoolController

from drex.control.policy.outlook import Pending
from drex.control.policy.yardstick import Yardstick

_BLAS_LIMITED = Lock()


class InBackground:
    """Solves one yardstick after the other on a thread, which is started with the first.

    BLAS gets one core meanwhile: equations as few as these are solved no faster on several, which passes need.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, solve: Callable[[], Yardstick]) -> Pending:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="drex-solver")
        return _UnderWay(self._thread.submit(_on_one_core, solve))


class _UnderWay:
    """A yardstick that a thread is solving."""

    def __init__(self, future: Future[Yardstick]) -> None:
        self._future = future

    def at(self, pass_number: int) -> Yardstick | None:
        return self._future.result() if self._future.done() else None


def _on_one_core(solve: Callable[[], Yardstick]) -> Yardstick:
    # OpenBLAS has one number of threads for the whole process: two that overlapped would restore each other's.
    with _BLAS_LIMITED, _openblas().limit(limits=1):
        return solve()


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")
