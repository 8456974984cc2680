"""Runs a server until it is told to stop: then nothing new is let in, and what is open is finished, or ends in time."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from drex.llm import LLM
from drex.server import listening
from drex.server.app import create_app
from drex.server.connection import Connection
from drex.server.serving import Serving
from drex.server.settings import ServerSettings

log = logging.getLogger(__name__)
TICK = 0.05
"""Seconds between two looks at what is still open."""
KEEP_ALIVE = 75
"""Seconds for which idle connections stay: longer than clients keep theirs, so that none is closed as it is used."""
LAST_WORDS = 2
"""Seconds, at least, in which what is finished or failed can be sent before connections are closed."""


class Server(uvicorn.Server):
    """uvicorn's server, with a way to stop that keeps answering: while it drains, health and new requests get a 503.

    Args:
        serving: what is served.
        sockets: to accept clients from, bound to the server's addresses.
    """

    def __init__(self, serving: Serving, sockets: Sequence[socket.socket]) -> None:
        made = partial(Connection, serving.settings, serving.telemetry)
        super().__init__(
            uvicorn.Config(
                create_app(serving),
                http=cast(type[asyncio.Protocol], made),  # uvicorn only calls it
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self.serving = serving
        self._sockets = list(sockets)
        self._stopping: asyncio.Task[None] | None = None
        self._closing: set[object] = set()
        self._looked = 0.0

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port, *_ = self._sockets[0].getsockname()
        return host, port

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; raises ValueError if somebody else has come to listen there."""
        listening.listen(self._sockets)
        super().run(self._sockets if sockets is None else sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.address
        log.info("serving at http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: the first drains, a second one ends all at once."""
        self.stop(at_once=self.serving.draining)

    def stop(self, at_once: bool = False) -> None:
        """Shut down, finishing what is open unless it is to happen at once; called in the main thread."""
        self.serving.draining = True
        if at_once:
            self.should_exit = self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End connections and the engine; at once, too, everyone who waits hears of it, if that takes no time."""
        await super().shutdown(sockets)
        if self.force_exit:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS):
                    await self.lifespan.shutdown()
                    await asyncio.gather(*self.server_state.tasks, return_exceptions=True)

    async def on_tick(self, counter: int) -> bool:
        """Whether to exit; called ten times a second."""
        serving = self.serving
        if serving.engine.failure is not None:
            serving.draining = self.should_exit = True
        elif serving.draining and self._stopping is None:
            log.info("draining", extra={"fields": {"unfinished": serving.unfinished}})
            self._stopping = asyncio.create_task(self._drain())
        self._cut_off()
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        """Drop connections that were to be closed a while ago, and whose clients don't read what is left to send."""
        now, patience = time.monotonic(), self.serving.settings.body_timeout
        if now - self._looked < patience:
            return
        connections = [one for one in self.server_state.connections if one.transport.is_closing()]
        for connection in connections:
            if connection in self._closing:
                connection.transport.abort()
        self._closing, self._looked = set(connections), now

    async def _drain(self) -> None:
        """Wait for what is open, as long as it may take; then end it."""
        serving, now = self.serving, asyncio.get_running_loop().time
        serving.refuse_bodies()
        end = now() + serving.settings.shutdown_timeout
        while serving.unfinished and now() < end:
            await asyncio.sleep(TICK)
        if serving.unfinished:
            log.warning("not finished in time", extra={"fields": {"unfinished": serving.unfinished}})
            await serving.engine.stop()
        # What was finished, or has failed, is still to be sent: uvicorn waits for that.
        self.config.timeout_graceful_shutdown = max(LAST_WORDS, round(end - now()))
        self.should_exit = True


def serve(llm: LLM, settings: ServerSettings, sockets: Sequence[socket.socket]) -> int:
    """Serve on bound sockets until a signal comes.

    Returns:
        The exit code: 0, or 1 if the server could not start or the engine failed.

    Raises:
        ValueError: somebody else listens at an address by now.
    """
    server = Server(Serving(llm, settings), sockets)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the application did not start; the log has the reason
        return 1
    return 1 if server.serving.engine.failure is not None else 0
