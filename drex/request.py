"""A request: its tokens, and what was recorded when each was decided.

Invariant: `depths` has one entry for every position whose next token is known.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from drex.config import EarlyExit, ExitRule, check_run_ahead
from drex.control.plan import Draws

MAX_LOGPROBS = 20
NO_SEED = -1
"""As front ends of many engines, and vLLM, say that there is no seed."""
LARGEST = 2**53
"""Whole numbers from here on are not all exact as floats, and none is a sensible setting."""


class FinishReason(enum.StrEnum):
    """Why a request ended: an end or stop token or string, its length, the user, or a failed pass."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


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
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {range_}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}: give at most max_tokens, which is {self.max_tokens}")
        if self.seed == NO_SEED:
            object.__setattr__(self, "seed", None)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}: give non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids or []
        if not isinstance(ids, list | tuple) or not all(_whole(token) for token in ids):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}: give a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        bias = self.logit_bias or {}
        if not isinstance(bias, dict) or not all(
            _whole(token) and _number(value) and -100 <= value <= 100 for token, value in bias.items()
        ):
            raise ValueError(f"logit_bias is {self.logit_bias!r}: map token ids to numbers in [-100, 100]")

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


class ExitCheck(NamedTuple):
    """What one exit point said of one token: its confidence, and the threshold in force there."""

    exit_index: int
    confidence: float
    threshold: float


class TokenRecord(NamedTuple):
    """One generated token: where it was emitted, and what was measured on the way there.

    `depth` counts segments executed. `top` holds (token id, log-probability) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    depth: int
    confidence: float
    checks: tuple[ExitCheck, ...]
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Ahead:
    """A token that stands on others which may turn out wrong, or that may be wrong itself.

    With a `record` it is decided, as soon as what it stands on is. Without, an exit point said it, not being sure.
    When it was taken, it stood on `open_rows`, itself included, and the product of their chances was `chance`.
    """

    record: TokenRecord | None
    exit_index: int
    confidence: float
    open_rows: int = 0
    chance: float = 1.0


@dataclass(eq=False)
class Request:
    """One sample of one prompt on its way through the engine.

    While it runs it has a `seat`, and how far it has come is in the columns there (`drex.control.seats`). Times are the
    executor's, in seconds; the next token is `due` by the request's own targets, and by `paced_due` under the engine's
    bound on slowdown.

    Under run-ahead (`drex.control.drafts`), `tokens` and `records` are what is settled, `context` goes on with the
    tokens that are not, and `ahead` says how they came.

    `end_token_ids` end its text; `banned` are those that may not come before `min_tokens`.

    `finish_reason` is None until the request has ended; `error` says what went wrong where the reason is `error`.

    With a `score_rule` the prompt's own tokens are scored: each prompt row is measured as if it were decoded, and
    exits where that rule says so. Without one, prompt rows run at full depth and are not measured.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    rule: ExitRule
    seed: int
    eos_token_ids: frozenset[int]
    num_segments: int
    arrival: int = 0
    sample: int = 0
    score_rule: ExitRule | None = None
    run_ahead: str = "off"

    tokens: list[int] = field(init=False)
    context: list[int] = field(init=False)
    ahead: list[Ahead] = field(default_factory=list)
    end_token_ids: frozenset[int] = field(init=False)
    banned: tuple[int, ...] = field(init=False)
    draws: Draws = field(init=False)
    score_draws: Draws = field(init=False)
    depths: list[int] = field(init=False)
    records: list[TokenRecord] = field(default_factory=list)
    prompt_records: dict[int, TokenRecord] = field(default_factory=dict)
    seat: int | None = None
    arrived_at: float = 0.0
    first_token_at: float | None = None
    due: float = math.inf
    paced_due: float = 0.0
    abort_asked: FinishReason | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.params.stop_token_ids, tuple)
        stops = frozenset(self.params.stop_token_ids)
        self.end_token_ids = stops if self.params.ignore_eos else stops | self.eos_token_ids
        self.banned = tuple(sorted(stops | self.eos_token_ids))
        self.tokens = list(self.prompt)
        self.context = list(self.prompt)
        self.draws = self._draws(self.rule)
        self.score_draws = self._draws(self.score_rule or self.rule)
        self.depths = [self.num_segments] * (len(self.prompt) - 1)

    def _draws(self, rule: ExitRule) -> Draws:
        return Draws(self.request_id, rule, self.params, self.seed, self.sample, self.context, len(self.prompt))

    @property
    def priority(self) -> int:
        """Smaller comes first."""
        return self.params.priority

    @property
    def max_tokens(self) -> int:
        """Outputs it may have."""
        return self.params.max_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def take(self, record: TokenRecord) -> None:
        """A token is settled; `context` has it already."""
        self.records.append(record)
        self.depths.append(record.depth)
        self.tokens.append(record.token_id)

    def forget_drafts(self) -> None:
        """Nothing is tentative any more."""
        del self.context[len(self.tokens) :]
        self.ahead.clear()

    def cut(self, outputs: int) -> None:
        """Take back what was recorded behind the first `outputs` tokens: a stop string ended the text there."""
        length = len(self.prompt) + outputs
        del self.records[outputs:], self.tokens[length:], self.depths[length - 1 :]

    def may_exit(self, exit_index: int, number: int, confidence: float) -> bool:
        """Whether the request lets output token `number`, from 0, exit at an exit point with some confidence.

        The first token never exits early, and no token of a lossless request does.
        """
        if number == 0 or self.run_ahead == "lossless":
            return False
        return confidence >= self.rule.bar(exit_index, number, self.max_tokens)

    def bars(self, number: int) -> tuple[float, ...]:
        """The confidence that each exit point asks of output token `number`, from 0; infinite where it can't exit."""
        return self.rule.bars(number, self.params.max_tokens)

    def ends(self, token: int, number: int) -> bool:
        """Whether a token that comes as output `number`, from 1, ends the text."""
        return token in self.end_token_ids and number >= self.params.min_tokens

    def ending(self, token: int, number: int) -> FinishReason | None:
        """Why the request ends with a token as output `number`, if it does; notes a stop token as `stop_reason`."""
        if self.ends(token, number):
            assert isinstance(self.params.stop_token_ids, tuple)
            self.stop_reason = token if token in self.params.stop_token_ids else None
            return FinishReason.STOP
        return FinishReason.LENGTH if number >= self.max_tokens else None
