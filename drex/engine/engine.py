"""The engine: requests in, chunks of text out, one pass at a time."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from drex.control.cost.model import Load
from drex.control.plan import Pass, PassResult
from drex.control.policy.base import View
from drex.control.request import Request, TokenRecord
from drex.control.scheduler import Scheduler
from drex.engine.executor import Executor
from drex.engine.metrics import Metrics, PassRecord
from drex.engine.report import engine_report
from drex.engine.samples import Emitted, Sample, token_output
from drex.outputs import FinishReason, TokenOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class _UnderWay(NamedTuple):
    """A submitted pass: what it was chosen from, its gain (see `PassRecord`), when planning it began, and ended."""

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
        torn: whether a call is under way, or was interrupted where what is known of the requests may contradict itself:
            only `reset` helps then.
        reserved_by: who alone may use the engine; None: whoever holds it.
        checks_integrity: whether slots, arena rows and requests are checked against each other whenever the engine
            falls idle; DREX_CHECK_INTEGRITY in the environment turns it on.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.scheduler, self.executor, self.tokenizer = scheduler, executor, tokenizer
        self.stats = EngineStats()
        self.metrics = Metrics()
        self.history: list[PassRecord] | None = None
        self.torn = False
        self.reserved_by: str | None = None
        self.checks_integrity = bool(os.environ.get("DREX_CHECK_INTEGRITY"))
        self._said = False
        self._under_way: _UnderWay | None = None
        self._samples: dict[str, Sample] = {}
        self._layers = list(accumulate(scheduler.layout.lengths))

    def check_fits(self, request: Request) -> None:
        """Raise ValueError, naming the remedy, for a request that could never be served."""
        self.scheduler.check_fits(request)

    def add(self, request: Request, arrived: float | None = None) -> None:
        """Take in a request, which came at a time of the executor's (None: now).

        Raises:
            ValueError: it could never be served.
        """
        self.check_fits(request)
        sample = Sample(request, self.tokenizer, self._layers)
        self.torn = True
        self.scheduler.add(request, self.executor.now() if arrived is None else arrived)
        self._samples[request.request_id] = sample
        self.torn = False

    def abort(self, request_id: str) -> None:
        """End a request; what it holds is free again at once. Unknown ids are ignored: it may just have ended."""
        if request_id in self._samples:
            self.torn = True
            self.scheduler.finish(request_id, FinishReason.ABORT)
            request = self._samples.pop(request_id).request
            self.metrics.ended(request, FinishReason.ABORT, self.executor.now())
            self.torn = False

    def reset(self, error: str) -> list[Emitted]:
        """End all requests with an error and begin anew: what was torn is left behind.

        The model, its K/V memory, the metrics and the cost model stay. Returns the end of each request.
        """
        self.torn = True
        self.executor.abandon()
        self._under_way = None
        self.scheduler = self.scheduler.renewed()
        samples, self._samples = list(self._samples.values()), {}
        now, out = self.executor.now(), []
        for sample in samples:
            self.metrics.ended(sample.request, FinishReason.ERROR, now)
            out.append(sample.end_with_error(error))
        self.torn = False
        return out

    def knows(self, request_id: str) -> bool:
        """Whether a request was added and has not ended."""
        return request_id in self._samples

    def request_ids(self) -> list[str]:
        """The requests that have not ended."""
        return list(self._samples)

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

        An interruption of a pass loses that pass and its requests; one between passes leaves the engine `torn`.
        """
        self.torn = True
        out = self._step()
        if self.checks_integrity and not self.busy:
            self.scheduler.check_integrity()
        self.torn = False
        return out

    def _step(self) -> list[Emitted]:
        executor, scheduler = self.executor, self.scheduler
        current = self._under_way or self._start()
        if current is None:
            return []
        self._under_way = None
        try:
            result = executor.collect()
        except BaseException as error:
            self._lose(current.batch, error)
            self.torn = False
            raise
        executed = executor.now()
        scheduler.commit(current.batch, result, executed)
        try:
            if executor.asynchronous:
                self._under_way = self._start()
        except BaseException:
            torn, self.torn = self.torn, True
            self._forget(current.batch)
            self.torn = torn
            raise
        touched = scheduler.record(current.batch)
        # A request that a stop string has ended may have been in a pass that was under way then.
        out = [self._emit(each, executed) for each in touched if each.request_id in self._samples]
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
        gain = None if self.history is None or view is None else self.scheduler.gain(view)
        under_way = _UnderWay(batch, view, gain, started, self.executor.now())
        try:
            self.executor.submit(batch)
        except BaseException as error:
            self._lose(batch, error)
            self.torn = False
            raise
        return under_way

    def _lose(self, batch: Pass, error: BaseException) -> None:
        """An interruption: the pass is lost, and so are its requests."""
        self.executor.abandon()
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
        if not self._said and rule.pays is False:
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
        return engine_report(self.scheduler.report(), self.metrics, self._layers)

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

    def _emit(self, request: Request, now: float) -> Emitted:
        """What a pass brought to a request, which ends if no text can be made of it."""
        sample = self._samples[request.request_id]
        if sample.tokens and len(request.records) > len(sample.tokens):
            self.metrics.gap(request, now - sample.last_at)
        sample.last_at = now
        before = len(sample.tokens)
        chunk = sample.take_records()
        self.stats.tokens += len(sample.tokens) - before
        if chunk.finish_reason is None:
            return request.request_id, chunk, None
        reason = FinishReason(chunk.finish_reason)
        if request.finish_reason is None:
            # A stop string, or text that could not be made: the scheduler doesn't know yet.
            self.scheduler.finish(request.request_id, reason, request.error)
        del self._samples[request.request_id]
        self.metrics.ended(request, reason, now)
        return request.request_id, chunk, sample.whole(reason)

    def prompt_tokens(self, request: Request) -> tuple[TokenOutput, ...]:
        """The scored prompt tokens of a finished request: all but the first, which nothing predicts."""
        records = [request.prompt_records[position] for position in range(len(request.prompt) - 1)]
        tokenizer = self.tokenizer
        texts = ["" if tokenizer is None else str(tokenizer.decode([record.token_id])) for record in records]
        return tuple(self.token_output(record, text) for record, text in zip(records, texts, strict=True))

    def token_output(self, record: TokenRecord, text: str) -> TokenOutput:
        """A record in the user's terms: layers instead of segments."""
        return token_output(record, text, self._layers)
