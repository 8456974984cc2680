"""What all endpoints share: the model, its engine, the thread that prepares requests, and who is let in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from drex.control.request import Request
from drex.engine.async_engine import AsyncEngine
from drex.engine.streams import Stream
from drex.inputs.processor import ContextLengthError, check_unicode
from drex.llm import LLM
from drex.server.errors import ApiError
from drex.server.logprobs import TokenTexts
from drex.server.settings import ServerSettings
from drex.server.telemetry import Telemetry

T = TypeVar("T")
RETRY_AFTER = {"retry-after": "1"}


class Serving:
    """A model that is being served.

    Args:
        llm: used by nobody else from `start` to `stop`.
        settings: of the server.

    Attributes:
        texts: of single tokens.
        draining: what is open is finished, and nothing new is let in.
        created: when the server started, seconds since 1970.
        bodies: deadlines of those that are still coming.
    """

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm, self.settings = llm, settings
        self.telemetry = Telemetry(settings.served_names[0], llm.model.exits.layers, llm.model.decoder.spec.num_layers)
        self.engine = AsyncEngine(llm.engine, self.telemetry)
        self.draining = False
        self.bodies: set[asyncio.Timeout] = set()
        self.created = int(time.time())
        # One thread: a tokeniser can't be used by several at once, nor can requests be numbered.
        self._intake = ThreadPoolExecutor(1, thread_name_prefix="drex-intake")
        # Another: a large body is no reason for small ones to wait until they are tokenised.
        self._bodies = ThreadPoolExecutor(1, thread_name_prefix="drex-bodies")
        self._preparing = 0
        self.texts = TokenTexts(llm.tokenizer)
        self._longest_token = max(map(len, llm.tokenizer.get_vocab())) if llm.tokenizer is not None else 0

    def start(self) -> None:
        """Start serving, on the running event loop."""
        self.engine.start()

    async def stop(self) -> None:
        """End the engine; what is still open ends with an error."""
        await self.engine.stop()
        self._intake.shutdown()
        self._bodies.shutdown()

    @property
    def unfinished(self) -> int:
        """Requests (samples) that have not ended."""
        return self.engine.unfinished + self._preparing

    def refuse_bodies(self) -> None:
        """End the wait for bodies that are still coming: they are not served any more."""
        for body in self.bodies:
            body.reschedule(asyncio.get_running_loop().time())

    def check_open(self) -> None:
        """Raise ApiError (503) unless new requests are let in."""
        if self.draining:
            raise ApiError(503, "the server is shutting down: send the request elsewhere", headers=RETRY_AFTER)
        if self.engine.stopped.is_set():
            raise ApiError(503, "the engine has stopped: start the server again")

    def check_model(self, name: str | None) -> str:
        """The name to answer with; raises ApiError (404) for a model that isn't served."""
        names = self.settings.served_names
        if name is not None and name not in names:
            raise ApiError(404, f"the model {name!r} does not exist here: use {', '.join(names)}", "model")
        return name or names[0]

    def check_text(self, text: str, field: str) -> None:
        """Raise ApiError (400) for text that has no tokens, or more than fit however it is tokenised."""
        most = self.llm.config.max_model_len
        if self._longest_token and len(text) > most * self._longest_token:
            said = f"{field} has {len(text)} characters, more than these can hold"
            raise ApiError.of(ContextLengthError(most, said, "shorten it"), [field])
        try:
            check_unicode(text)
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", field) from error

    async def read(self, work: Callable[[], T]) -> T:
        """Run what reads a large body beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._bodies, work)

    async def prepare(self, work: Callable[[], T], fields: Sequence[str]) -> T:
        """Run what tokenises and validates beside the event loop.

        Args:
            work: that raises ValueError for what can't be served.
            fields: of the request, that such an error may be about.

        Raises:
            ApiError: 400.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._intake, work)
        except ValueError as error:
            raise ApiError.of(error, fields) from error

    async def submit(self, count: int, make: Callable[[], list[Request]], fields: Sequence[str]) -> Stream:
        """Make `count` requests and serve them.

        Raises:
            ApiError: 400 for what can never be served, 429 if too many wait, 503 while draining.
        """
        self.check_open()
        most = self.llm.config.max_num_seqs + self.settings.max_queue
        if count > most:
            raise ApiError(400, f"prompts times n is {count}: give at most {most} at a time", "prompt")
        if self.unfinished + count > most:
            raise ApiError(
                429, f"{self.unfinished} requests are being served or wait: try again later", headers=RETRY_AFTER
            )
        self._preparing += count
        try:
            requests = await self.prepare(make, fields)
        finally:
            self._preparing -= count
        return self.engine.submit(requests)
