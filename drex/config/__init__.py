"""Settings: what a user asks for, and what it resolves to for one model."""

from drex.config.engine import (
    DEFAULTS,
    DTYPES,
    FILL_ROWS,
    RUN_AHEAD,
    EngineConfig,
    EngineOptions,
    check_lossless,
    check_run_ahead,
)
from drex.config.exits import SCHEDULES, EarlyExit, ExitPlan, ExitRule, per_exit, resolve_exits

__all__ = [
    "DEFAULTS",
    "DTYPES",
    "FILL_ROWS",
    "RUN_AHEAD",
    "SCHEDULES",
    "EarlyExit",
    "EngineConfig",
    "EngineOptions",
    "ExitPlan",
    "ExitRule",
    "check_lossless",
    "check_run_ahead",
    "per_exit",
    "resolve_exits",
]
