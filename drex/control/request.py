"""A request: its tokens, and what was recorded when each was decided.

Invariant: `depths` has one entry for every position whose next token is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from drex.config import ExitRule
from drex.control.plan import Draws
from drex.outputs import ExitCheck, FinishReason
from drex.sampling_params import SamplingParams


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

    Under run-ahead (`control.run_ahead.drafts`), `tokens` and `records` are what is settled, `context` goes on with the
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

    # Each change of a request is one of these; nobody else writes to it.

    def arrive(self, now: float) -> None:
        """It came, at a time of the executor's."""
        self.arrived_at = now

    def say(self, token: int) -> None:
        """A token is decided; its record is still to be taken."""
        self.context.append(token)

    def draft(self, token: int, entry: Ahead) -> None:
        """A token is taken tentatively, after all others."""
        self.context.append(token)
        self.ahead.append(entry)

    def take_back(self, length: int) -> None:
        """Only the first `length` tokens stand, settled ones and tentative ones."""
        assert len(self.tokens) <= length < len(self.context)
        del self.ahead[length - len(self.context) :], self.context[length:]

    def settle_draft(self) -> Ahead:
        """The first tentative token stands on nothing open any more: `take` its record."""
        return self.ahead.pop(0)

    def score(self, position: int, record: TokenRecord) -> None:
        """A row of the prompt was measured."""
        self.prompt_records[position] = record
        self.depths[position] = record.depth

    def first_token_came(self, now: float) -> None:
        """Due times count from here."""
        self.first_token_at = self.paced_due = now

    def next_is_due(self, due: float, paced_due: float) -> None:
        """Set when the next token is due: by all targets, and by the engine's bound on slowdown."""
        self.due, self.paced_due = due, paced_due

    def ask_to_abort(self, reason: FinishReason, error: str | None) -> None:
        """It is to end as soon as the pass that holds it is committed."""
        self.abort_asked, self.error = reason, error

    def fail(self, error: str) -> None:
        """It is to end with an error; whoever ends it reads that."""
        self.error = error

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """It has ended."""
        self.finish_reason, self.error = reason, error

    def take(self, record: TokenRecord) -> None:
        """A token is settled; `context` has it already."""
        self.records.append(record)
        self.depths.append(record.depth)
        self.tokens.append(record.token_id)

    def forget_drafts(self) -> None:
        """Nothing is tentative any more."""
        del self.context[len(self.tokens) :]
        self.ahead.clear()

    def cut(self, outputs: int, stop_reason: str) -> None:
        """Take back what was recorded behind the first `outputs` tokens: a stop string ended the text there."""
        self.stop_reason = stop_reason
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
