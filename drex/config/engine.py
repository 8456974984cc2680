"""Settings of an engine: what a user asks for, and what it resolves to for one model on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drex.errors import SettingError
from drex.extensions import POLICIES

RUN_AHEAD = ("off", "trusted", "lossless")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
FILL_ROWS, FILL_ROWS_A_REQUEST = 256, 8
"""Of `max_fill_rows`: at least, and for each request in flight. At exit rate .8 a buffered row owes 4 in the mean."""


def check_run_ahead(mode: str) -> str:
    """A mode of run-ahead as given; raises SettingError for an unknown one."""
    if mode not in RUN_AHEAD:
        raise SettingError("run_ahead", f"run_ahead {mode!r}: choose one of {', '.join(RUN_AHEAD)}")
    return mode


def check_lossless(mode: str, kv_fill: str) -> None:
    """Raise SettingError for a mode of run-ahead that the engine's K/V fill can't serve."""
    if mode == "lossless" and kv_fill != "recompute":
        raise SettingError(
            "run_ahead",
            f"run_ahead 'lossless' needs exact K/V, and the engine serves kv_fill {kv_fill!r}: "
            f"choose kv_fill 'recompute', or run_ahead 'trusted'",
        )


def _check(settings: EngineConfig | EngineOptions) -> None:
    sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_fill_rows", "max_wait_passes", "max_draft")
    for name in sizes:
        value: int | None = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingError(name, f"{name} is {value}: give at least 1")
    if settings.kv_cache_tokens is not None and settings.kv_cache_tokens < 2:
        raise SettingError(
            "kv_cache_tokens",
            f"kv_cache_tokens is {settings.kv_cache_tokens}: give at least 2, a prompt token and its answer",
        )
    if settings.max_slowdown is not None and not settings.max_slowdown >= 1:
        raise SettingError("max_slowdown", f"max_slowdown is {settings.max_slowdown}: give a factor from 1 on, or None")
    check_run_ahead(settings.run_ahead)
    POLICIES.check(settings.policy)
    if settings.policy_parameters:
        POLICIES.check_parameters(settings.policy, settings.policy_parameters, arguments=1)


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine, resolved: all that it goes by.

    Args:
        max_model_len: tokens that a request may have, prompt and output together.
        max_num_seqs: requests in flight.
        max_num_batched_tokens: rows that a pass may have; longer prompts are chunked.
        kv_cache_tokens: tokens for which the K/V pool has slots at every layer.
        max_fill_rows: rows that exited and still owe K/V, over all requests; beyond, they are filled. None: 8 a request
            in flight, and at least 256.
        max_wait_passes: passes that a row waits in the rebatching buffer at most.
        max_slowdown: bound on how much longer than at full depth a request may take, as a factor; None: no bound.
        adaptive: stop checking exits while that does not pay; output then depends on load.
        run_ahead: whether a request goes on from what an exit point says without being sure: `off`; `trusted`, which
            gives the same tokens as early exit; or `lossless`, which gives those of full depth, whatever exits say.
        max_draft: open rows that a request may have under run-ahead.
        policy: `drex` (rebatching), `split` (flush at once), `full` (no exits), one of the baselines to compare with:
            `art`, `consensus`, `majority`, `greedy`, `latency_only`; or one that `drex.register_policy` was given.
        policy_parameters: of the policy, by name.

    Raises:
        SettingError: a value out of range, naming the range.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    max_fill_rows: int | None = None
    max_wait_passes: int = 32
    max_slowdown: float | None = None
    adaptive: bool = False
    run_ahead: str = "trusted"
    max_draft: int = 4
    policy: str = "drex"
    policy_parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def fill_rows(self) -> int:
        """Fills that may be owed, over all requests."""
        default = max(FILL_ROWS, FILL_ROWS_A_REQUEST * self.max_num_seqs)
        return default if self.max_fill_rows is None else self.max_fill_rows

    @property
    def arena_rows(self) -> int:
        """Hidden states the arena holds: one pass's rows, a live row a request, and the owed fills."""
        return self.max_num_batched_tokens + self.max_num_seqs + self.fill_rows


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine as a user asks for them: `EngineConfig`, before model and machine are known.

    Args:
        max_model_len: None is what the checkpoint was made for, or its sliding window where that is shorter.
        kv_cache_tokens: None is as many as the machine's memory has room for, and requests can use.
        gpu_memory_utilization: share of a GPU's memory that drex may take, in (0, 1]; instead of `kv_cache_tokens`.

    Raises:
        SettingError: a value out of range, naming the range.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    max_fill_rows: int | None = None
    max_wait_passes: int = EngineConfig.max_wait_passes
    max_slowdown: float | None = None
    adaptive: bool = EngineConfig.adaptive
    run_ahead: str = EngineConfig.run_ahead
    max_draft: int = EngineConfig.max_draft
    policy: str = EngineConfig.policy
    policy_parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)
        share = self.gpu_memory_utilization
        if share is not None and self.kv_cache_tokens is not None:
            raise SettingError("kv_cache_tokens", "kv_cache_tokens and gpu_memory_utilization: give one of them")
        if share is not None and not 0 < share <= 1:
            raise SettingError("gpu_memory_utilization", f"gpu_memory_utilization is {share}: give a share in (0, 1]")

    def resolved(self, max_model_len: int, kv_cache_tokens: int) -> EngineConfig:
        """The settings with what only model and machine can say."""
        return EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            max_fill_rows=self.max_fill_rows,
            max_wait_passes=self.max_wait_passes,
            max_slowdown=self.max_slowdown,
            adaptive=self.adaptive,
            run_ahead=self.run_ahead,
            max_draft=self.max_draft,
            policy=self.policy,
            policy_parameters=self.policy_parameters,
        )


DEFAULTS = EngineOptions()
"""What the façade and the command line take where a user says nothing."""
