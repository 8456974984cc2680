"""The engine: requests in, chunks of text out, one pass at a time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from drex.control.cost import Load
from drex.control.plan import Pass, PassResult
from drex.control.policies import View
from drex.control.scheduler import Scheduler
from drex.control.standing import Standing
from drex.engine.detokenizer import Detokenizer
from drex.engine.executor import Executor
from drex.engine.metrics import Metrics, PassRecord
from drex.outputs import Chunk, CompletionOutput, TokenOutput
from drex.request import FinishReason, Request, TokenRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Emitted = tuple[str, Chunk, CompletionOutput | None]
"""Request id, what is new, and the whole sample once it is finished."""


@dataclass
class _Sample:
    """A request on its way out: which of its records became text."""

    request: Request
    detokenizer: Detokenizer
    tokens: list[TokenOutput] = field(default_factory=list)
    last_at: float = 0.0


class _UnderWay(NamedTuple):
    """A pass that was submitted: what it was chosen from, when it was begun to be planned, and when it was.

    `gain` is as of `PassRecord`.
    """

    batch: Pass
    view: View | None
    gain: float | None
    started: float
    planned: float


@dataclass
class EngineStats:
    """What the engine has done. `seconds` splits its own time (scheduling, bookkeeping, text) from the executor's."""

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    peak_slots: int = 0
    own_seconds: float = 0.0
    executor_seconds: float = 0.0


class Engine:
    """Joins a scheduler and an executor.

    Args:
        scheduler: decides.
        executor: computes.
        tokenizer: for text; None leaves it empty.

    Attributes:
        metrics: of requests that ended; may be replaced by fresh ones at any time.
        history: of passes, where it is a list: set one to have them recorded.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.scheduler, self.executor, self.tokenizer = scheduler, executor, tokenizer
        self.stats = EngineStats()
        self.metrics = Metrics()
        self.history: list[PassRecord] | None = None
        self._said = False
        self._under_way: _UnderWay | None = None
        self._samples: dict[str, _Sample] = {}
        self._layers = list(accumulate(scheduler.layout.lengths))

    def add(self, request: Request, arrived: float | None = None) -> None:
        """Take in a request, which came at a time of the executor's (None: now).

        Raises:
            ValueError: it could never be served.
        """
        params = request.params
        self.scheduler.add(request, self.executor.now() if arrived is None else arrived)
        self._samples[request.request_id] = _Sample(
            request,
            Detokenizer(
                self.tokenizer,
                request.prompt,
                params.stop_strings,
                params.skip_special_tokens,
                params.include_stop_str_in_output,
            ),
        )

    def abort(self, request_id: str) -> None:
        """End a request; what it holds is free again at once. Unknown ids are ignored: it may just have ended."""
        if request_id in self._samples:
            self.scheduler.finish(request_id, FinishReason.ABORT)
            request = self._samples.pop(request_id).request
            self.metrics.ended(request, FinishReason.ABORT, self.executor.now())

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._samples)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished, or a pass under way."""
        return bool(self._samples) or self._under_way is not None

    def step(self) -> list[Emitted]:
        """Finish one pass. Returns what it brought to each request that got a token or ended.

        Where passes run beside this thread the next one is started as soon as this one has been taken in, and runs
        while records and text are made of what this one brought.
        """
        executor, scheduler = self.executor, self.scheduler
        current = self._under_way or self._start()
        if current is None:
            return []
        self._under_way = None
        try:
            result = executor.collect()
        except BaseException as error:
            self._lose(current.batch, error)
            raise
        executed = executor.now()
        scheduler.commit(current.batch, result, executed)
        try:
            if executor.asynchronous:
                self._under_way = self._start()
        except BaseException:
            self._forget(current.batch)
            raise
        touched = scheduler.record(current.batch)
        # A request that a stop string has ended may have been in a pass that was under way then.
        out = [self._emit(each, result.error, executed) for each in touched if each.request_id in self._samples]
        ended = executor.now()
        seconds = (executed if executor.asynchronous else ended) - current.started
        if self.history is not None:
            self.history.append(self._record(current, seconds))
        scheduler.took(current.batch, seconds)
        self.stats.passes += 1
        self.stats.rows += current.batch.rows
        self.stats.peak_slots = max(self.stats.peak_slots, scheduler.pool.in_use)
        self.stats.executor_seconds += executed - current.planned
        self.stats.own_seconds += current.planned - current.started + ended - executed
        self._say_if_it_does_not_pay()
        return out

    def _start(self) -> _UnderWay | None:
        """Plan a pass and submit it; None while nothing can run."""
        started = self.executor.now()
        batch = self.scheduler.next(started)
        if batch is None:
            return None
        view = self.scheduler.view
        gain = None if self.history is None or view is None else self._gain(view)
        under_way = _UnderWay(batch, view, gain, started, self.executor.now())
        try:
            self.executor.submit(batch)
        except BaseException as error:
            self._lose(batch, error)
            raise
        return under_way

    def _gain(self, view: View) -> float | None:
        """As of `PassRecord`."""
        found = self.scheduler.policy.rule.outlook.yardstick
        return None if found is None or view.prompts else found.gain(view.ready, view.live[1:])

    def _lose(self, batch: Pass, error: BaseException) -> None:
        """An interruption: the pass is lost, and so are its requests."""
        lost = PassResult(None, RuntimeError(f"interrupted: {error!r}"))
        self.scheduler.commit(batch, lost, self.executor.now())
        self._forget(batch)

    def _forget(self, batch: Pass) -> None:
        """Nobody will hear of those that ended with a pass."""
        for request in self.scheduler.forget(batch):
            if request.finish_reason is not None:
                self._samples.pop(request.request_id, None)

    def _say_if_it_does_not_pay(self) -> None:
        rule = self.scheduler.policy.rule
        if rule.pays is False and not self._said:
            self._said = True
            log.warning(
                "early exit does not pay here: %.1f tokens/s at best against %.1f at full depth, with %d decoding; "
                "`drex advise` says more, adaptive=True stops checking while this is so",
                rule.promises,
                rule.full,
                rule.load,
            )

    def report(self) -> dict[str, Any]:
        """Everything that is measured, for people and for metrics: times, exits, rates, costs, slots.

        Rates are tokens a second while decoding: `achieved` a moving average; `theta_star`, `ideal` and `full` solved
        for the present load or the nearest one that was solved, None until then. With lossless requests `full` is that
        of the present load, and the others are not kept up to date: nothing is decided by them.
        """
        scheduler, metrics = self.scheduler, self.metrics
        rule, found = scheduler.policy.rule, scheduler.policy.rule.outlook.yardstick
        waiting = Standing.of(scheduler.seats).buffers[1:]
        return {
            **metrics.summary(),
            "running": len(scheduler.seats),
            "waiting": len(scheduler.admission.waiting),
            "buffered": [len(buffer) for buffer in waiting],
            "achieved": rule.achieved,
            "theta_star": found.optimal if found else None,
            "ideal": found.ideal if found else None,
            "full": rule.full,
            "exit_rates": rule.rates.all(),
            "exits": {self._layers[depth - 1]: count for depth, count in sorted(metrics.exits.items())},
            "involuntary_exits": metrics.involuntary_exits,
            "involuntary_stays": metrics.involuntary_stays,
            "unchecked": scheduler.unchecked,
            "run_ahead": scheduler.drafts.report(),
            "late": scheduler.deadlines.late,
            "infeasible": scheduler.deadlines.infeasible,
            "preemptions": scheduler.admission.preemptions,
            "cost_error": scheduler.cost.error_quantiles(),
            "slots_in_use": scheduler.pool.in_use,
            "slots": scheduler.pool.capacity,
        }

    def _record(self, done: _UnderWay, seconds: float) -> PassRecord:
        batch, view, work = done.batch, done.view, self.scheduler.work(done.batch)
        ready, live = (view.ready, tuple(view.live)) if view is not None else (0, ())
        load = Load.of(batch.parts[-1])
        return PassRecord(
            batch.number,
            batch.segment,
            batch.then is not None,
            ready,
            live,
            work.prompts > 0,
            load,
            done.gain,
            work.decided,
            done.started,
            seconds,
        )

    def _emit(self, request: Request, error: Exception | None, now: float) -> Emitted:
        sample = self._samples[request.request_id]
        if sample.tokens and len(request.records) > len(sample.tokens):
            self.metrics.gap(request, now - sample.last_at)
        sample.last_at = now
        fresh = []
        for number, record in enumerate(request.records[len(sample.tokens) :], len(sample.tokens) + 1):
            may_stop = number >= request.params.min_tokens
            fresh.append(self.token_output(record, sample.detokenizer.push(record.token_id, may_stop)))
            if sample.detokenizer.stopped_at is not None:
                # Under run-ahead several tokens come at once: what comes behind a stop string doesn't count.
                del request.records[number:], request.tokens[len(request.prompt) + number :]
                break
        self.stats.tokens += len(fresh)
        reason = request.finish_reason
        if sample.detokenizer.stopped_at is not None:
            request.stop_reason = sample.detokenizer.stopped_at
            if reason is None:
                self.scheduler.finish(request.request_id, FinishReason.STOP)
            reason = FinishReason.STOP
        if reason is not None:
            rest = sample.detokenizer.finish()
            if rest and fresh:
                fresh[-1] = fresh[-1]._replace(text=fresh[-1].text + rest)
        sample.tokens.extend(fresh)
        said = None if error is None else f"{type(error).__name__}: {error}"
        chunk = Chunk(request.sample, sample.detokenizer.show(reason is not None), tuple(fresh), reason, said)
        if reason is None:
            return request.request_id, chunk, None
        del self._samples[request.request_id]
        self.metrics.ended(request, reason, now)
        done = CompletionOutput(
            index=request.sample,
            text=sample.detokenizer.text,
            tokens=tuple(sample.tokens),
            finish_reason=reason,
            stop_reason=request.stop_reason,
            error=said,
        )
        return request.request_id, chunk, done

    def token_output(self, record: TokenRecord, text: str) -> TokenOutput:
        """A record in the user's terms: layers instead of segments."""
        return TokenOutput(
            id=record.token_id,
            text=text,
            logprob=record.logprob,
            exit_layer=self._layers[record.depth - 1],
            confidence=record.confidence,
            checks=record.checks,
            top_logprobs=record.top,
        )

    def prompt_tokens(self, request: Request) -> tuple[TokenOutput, ...]:
        """The scored prompt tokens of a finished request: all but the first, which nothing predicts."""
        records = [request.prompt_records[position] for position in range(len(request.prompt) - 1)]
        tokenizer = self.tokenizer
        texts = ["" if tokenizer is None else str(tokenizer.decode([record.token_id])) for record in records]
        return tuple(self.token_output(record, text) for record, text in zip(records, texts, strict=True))
