"""What users get back."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class FinishReason(enum.StrEnum):
    """Why a request ended: an end or stop token or string, its length, the user, or a failed pass."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ExitCheck(NamedTuple):
    """What one exit point said of one token: its confidence, and the threshold in force there."""

    exit_index: int
    confidence: float
    threshold: float


class TokenOutput(NamedTuple):
    """One generated token.

    Attributes:
        id, text: of the token; text is empty where the token ends inside a character.
        logprob: natural logarithm, of the unscaled distribution at the head that emitted it.
        exit_layer: layers that it executed.
        confidence: in [0, 1], at that head, by the request's criterion (max_prob at the end for those without one).
        checks: what every exit point on the way said.
        top_logprobs: the most likely tokens and their log-probabilities, best first, if asked for.
    """

    id: int
    text: str
    logprob: float
    exit_layer: int
    confidence: float
    checks: tuple[ExitCheck, ...]
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CompletionOutput:
    """One sample.

    `finish_reason` is stop, length, abort or error; `stop_reason` the stop token or string, if one hit.
    """

    index: int
    text: str
    tokens: tuple[TokenOutput, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples. `prompt_logprobs` has an entry a prompt token, None for the first, if asked for."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenOutput | None, ...] | None = None


@dataclass(slots=True)
class Chunk:
    """A piece of a streamed sample: new text and tokens; `finish_reason`, and `error` if there was one, on the last.

    `prompt_index` counts the prompts of the call, `index` the samples of a prompt. Not frozen: there is one a token,
    and freezing makes each dearer.
    """

    index: int
    text: str
    tokens: tuple[TokenOutput, ...]
    finish_reason: str | None = None
    error: str | None = None
    prompt_index: int = 0


@dataclass(frozen=True)
class Scored:
    """Teacher-forced log-probabilities of a sequence; each list has one entry for every token but the first.

    Attributes:
        logprobs: natural logarithms, at the head where the position exited.
        exit_layers: layers executed.
        confidences: at that head.
        best: the token that the head found most likely.
    """

    logprobs: list[float]
    exit_layers: list[int]
    confidences: list[float]
    best: list[int]

    @property
    def loss(self) -> float:
        """Mean negative log-probability, nats a token."""
        return -sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class ExitStats:
    """Exit behaviour of some tokens.

    Attributes:
        tokens: how many.
        exits: tokens by the number of layers they executed.
        involuntary_exits: emitted at an exit point below its threshold.
        involuntary_stays: reached the threshold at an exit point and were emitted deeper.
    """

    tokens: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    involuntary_exits: int = 0
    involuntary_stays: int = 0

    @property
    def mean_depth(self) -> float:
        """Layers a token, on average; 0 without tokens."""
        return sum(layer * count for layer, count in self.exits.items()) / self.tokens if self.tokens else 0.0

    @classmethod
    def of(cls, tokens: Iterable[TokenOutput], num_layers: int) -> ExitStats:
        """Count, from the confidences that were recorded."""
        listed = list(tokens)
        forced = stayed = 0
        for token in listed:
            passed = token.checks
            if token.exit_layer < num_layers:
                # A token that left without a check left without being asked.
                forced += not passed or passed[-1].confidence < passed[-1].threshold
                passed = passed[:-1]
            stayed += any(check.confidence >= check.threshold for check in passed)
        exits = Counter(token.exit_layer for token in listed)
        return cls(len(listed), dict(sorted(exits.items())), forced, stayed)
