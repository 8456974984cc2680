"""How tokens are drawn and when to stop, as users say it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from drex.config import EarlyExit, check_run_ahead
from drex.errors import SettingError

MAX_LOGPROBS = 20
NO_SEED = -1
"""As front ends of many engines, and vLLM, say that there is no seed."""
LARGEST = 2**53
"""Whole numbers from here on are not all exact as floats, and none is a sensible setting."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, and when to stop; names and meanings as vLLM's.

    Args:
        n: samples of one prompt; sample i differs from sample 0 in its noise only.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        seed: of the noise, which is a pure function of (seed, sample, position); None, or -1, draws one per request.
        logprobs, prompt_logprobs: how many most likely tokens to report beside the token itself.
        early_exit: overrides the engine's thresholds, criterion, schedule and allowed exits.
        run_ahead: overrides the engine's: `off`, `trusted` or `lossless`.
        priority: smaller numbers are served first, and lose their K/V last when it runs short.
        ttft_ms, tpot_ms, itl_ms: targets in milliseconds: for the first token, for the mean time of those after it, and
            for each gap between two. Met where they can be; what can't be is counted.

    Raises:
        ValueError: a value out of range, naming the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    include_stop_str_in_output: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    early_exit: EarlyExit | None = None
    run_ahead: str | None = None
    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None

    def __post_init__(self) -> None:
        checks = (
            (_whole(self.n) and self.n >= 1, "n", "a whole number from 1 on"),
            (_number(self.temperature) and 0 <= self.temperature <= 2, "temperature", "a number in [0, 2]"),
            (_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]"),
            (_whole(self.top_k) and self.top_k >= -1, "top_k", "a whole number from 0 (or -1: all) on"),
            (_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1]"),
            (_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 2, "repetition_penalty", "in (0, 2]"),
            (_number(self.presence_penalty) and -2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]"),
            (_number(self.frequency_penalty) and -2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]"),
            (self.seed is None or _whole(self.seed), "seed", "a whole number, or None"),
            (_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number from 1 on"),
            (_whole(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "a whole number from 0 on"),
            (_logprobs(self.logprobs), "logprobs", f"a whole number from 0 to {MAX_LOGPROBS}, or None"),
            (_logprobs(self.prompt_logprobs), "prompt_logprobs", f"a whole number from 0 to {MAX_LOGPROBS}, or None"),
            (_whole(self.priority), "priority", "a whole number"),
            (_target(self.ttft_ms), "ttft_ms", "milliseconds above 0, or None"),
            (_target(self.tpot_ms), "tpot_ms", "milliseconds above 0, or None"),
            (_target(self.itl_ms), "itl_ms", "milliseconds above 0, or None"),
        )
        if self.run_ahead is not None:
            check_run_ahead(self.run_ahead)
        for good, name, range_ in checks:
            if not good:
                raise SettingError(name, f"{name} is {getattr(self, name)!r}: give {range_}")
        if self.min_tokens > self.max_tokens:
            raise SettingError(
                "min_tokens", f"min_tokens is {self.min_tokens}: give at most max_tokens, which is {self.max_tokens}"
            )
        if self.seed == NO_SEED:
            object.__setattr__(self, "seed", None)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise SettingError("stop", f"stop is {self.stop!r}: give non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids or []
        if not isinstance(ids, list | tuple) or not all(_whole(token) for token in ids):
            raise SettingError("stop_token_ids", f"stop_token_ids is {self.stop_token_ids!r}: give a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        bias = self.logit_bias or {}
        if not isinstance(bias, dict) or not all(
            _whole(token) and _number(value) and -100 <= value <= 100 for token, value in bias.items()
        ):
            raise SettingError(
                "logit_bias", f"logit_bias is {self.logit_bias!r}: map token ids to numbers in [-100, 100]"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and truncation is applied to the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
        )

    @property
    def truncates(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1

    @cached_property
    def reshapes(self) -> bool:
        """Whether more than the logits, temperature and noise decides a token; asked once a token, hence kept."""
        return self.changes_logits or (self.temperature > 0 and self.truncates)


def _number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, float) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _target(value: object) -> bool:
    return value is None or (_number(value) and value > 0)  # type: ignore[operator]


def _logprobs(value: object) -> bool:
    return value is None or (isinstance(value, int) and _whole(value) and 0 <= value <= MAX_LOGPROBS)
