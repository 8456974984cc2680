"""One client's connection: uvicorn's HTTP/1.1 with limits on what comes before anybody asks for a key.

h11 parses, which serves what asks for an upgrade to HTTP/2 (`Upgrade: h2c`, as curl and the JDK's client do) as the
HTTP/1.1 request that it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from drex.server.errors import ApiError
from drex.server.settings import ServerSettings
from drex.server.streaming import encode
from drex.server.telemetry import Telemetry

access = logging.getLogger("drex.server.access")
faults = logging.getLogger("drex.server.connection")
faults.setLevel(logging.ERROR)  # uvicorn warns of every bad request; here each has its line in the access log
MAX_HEAD_BYTES = 2**16
"""Of a request's line and headers."""
SMALL_CHUNK, MAX_SMALL_CHUNKS = 64, 4096
"""Bytes that the chunks of a body must have in the mean once there are that many: each takes microseconds to parse."""
PIECE = 2**14
"""Bytes that are parsed at a time."""
LINGER = 2.0
"""Seconds for which a client that was refused may go on sending: closed sooner, it might not get to read why."""


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines, a bound on headers, and an eye on clients that go.

    It always has a deadline: for headers, and for the rest of a body that was answered before it came, `body_timeout`;
    while idle, uvicorn's time to keep it alive. What a client sends ahead of its answer (its next requests) is read and
    kept, up to one whole request: only who reads hears that the client is gone.

    Args:
        settings: of the server.
        telemetry: counts replies.
        config, server_state, app_state, _loop: uvicorn's.
    """

    def __init__(
        self,
        settings: ServerSettings,
        telemetry: Telemetry,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = faults
        self.conn = self._parser = _Parser()
        self._telemetry = telemetry
        self._patience = settings.body_timeout
        self._most_ahead = MAX_HEAD_BYTES + settings.max_body_bytes
        self._ahead = bytearray()
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None, 0)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._ahead += data
        self._parse()
        if len(self._ahead) > self._most_ahead:  # no one waits for an answer and sends that much
            self.transport.abort()

    def handle_events(self) -> None:
        """Go on with what was sent ahead; uvicorn calls this after each answer."""
        super().handle_events()
        self._parse()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_deadline()

    def shutdown(self) -> None:
        """End with the present answer, or, if the client does not take it, before uvicorn's patience does."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # nothing more can be said on it
            self.transport.close()
        self.loop.call_later((self.config.timeout_graceful_shutdown or 0) / 2, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 can't read; uvicorn calls this, in other words than ours."""
        error = self._parser.refusal
        if error is None:
            said, status = msg, 400
        elif error.error_status_hint == 431:
            said, status = f"the headers are larger than {MAX_HEAD_BYTES} bytes: send less in them", 431
        else:
            said, status = f"this is no HTTP/1.1 that can be read ({error}): send it with an HTTP client", 400
        self._refuse(ApiError(status, said))

    def _should_upgrade(self) -> bool:
        """Serve HTTP/1.1, whatever else a client offers to speak."""
        return False

    def _parse(self) -> None:
        """Parse what has come, up to the end of the present request."""
        while self._ahead and not (self._refused or self.transport.is_closing()):
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                break
            self.conn.receive_data(bytes(self._ahead[:PIECE]))
            del self._ahead[:PIECE]
            super().handle_events()
        # uvicorn reads no further while a request is answered.
        if self.conn.their_state is not h11.SEND_BODY and not self.transport.is_closing():
            self.flow.resume_reading()
        self._set_deadline()

    def _set_deadline(self) -> None:
        """Set the deadline of what is waited for, unless it runs already."""
        if self._refused or self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect(self._late, self._patience)
        elif state is h11.IDLE:
            self._expect(self.transport.close, self.timeout_keep_alive)
        elif state is h11.SEND_BODY and self.cycle.response_complete:
            self._expect(self.transport.abort, self._patience)
        else:  # the application's turn
            self._expect(None, 0)

    def _expect(self, otherwise: Callable[[], None] | None, seconds: float) -> None:
        """Do something after some seconds, unless that or something else is asked for until then; None: nothing."""
        if otherwise == self._waits_for:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._waits_for = otherwise
        self._deadline = None if otherwise is None else self.loop.call_later(seconds, otherwise)

    def _late(self) -> None:
        said = f"the headers did not come within {self._patience:g} s: send them faster"
        self._refuse(ApiError(408, said))

    def _refuse(self, error: ApiError) -> None:
        """Say what is wrong, if an answer has not begun, and close the connection when the client has read it."""
        if self._refused or self.transport.is_closing():
            return
        self._note(error)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the handler hears of it, and sends no more
            self.cycle.message_event.set()
        body = encode(error.body())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        try:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # an answer has begun, or it takes no body
        self._refused = True
        self._ahead.clear()
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write_eof()
        self._expect(self.transport.abort, LINGER)

    def _note(self, error: ApiError) -> None:
        client = self.client[0] if self.client else None
        fields = {"client": client, "status": error.status, "error": error.message}
        access.info("request", extra={"fields": fields})
        self._telemetry.replied("other", error.status)


class _Parser(h11.Connection):
    """h11's parser, with bounds on headers however they come, and on the number of small chunks.

    Attributes:
        refusal: why it reads no further.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal: h11.RemoteProtocolError | None = None
        self._chunks = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check_head(event)
            elif isinstance(event, h11.Data):
                self._check_chunks(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check_head(self, request: h11.Request) -> None:
        self._chunks = self._bytes = 0
        if request.http_version not in (b"1.0", b"1.1"):
            raise h11.RemoteProtocolError(f"it is HTTP/{request.http_version.decode()}")
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("headers are too large", error_status_hint=431)

    def _check_chunks(self, data: h11.Data) -> None:
        self._chunks += data.chunk_end
        self._bytes += len(data.data)
        if self._chunks > MAX_SMALL_CHUNKS and self._bytes < SMALL_CHUNK * self._chunks:
            raise h11.RemoteProtocolError(f"more than {MAX_SMALL_CHUNKS} chunks have under {SMALL_CHUNK} bytes each")
