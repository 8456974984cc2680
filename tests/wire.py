"""HTTP by hand, for clients that misbehave below it."""

from __future__ import annotations

import json
import socket
from typing import Any

from drex.server.run import Server

SHORT: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 1000, "n": 4}
"""Takes seconds."""
H2C = (
    "connection: Upgrade, HTTP2-Settings",
    "upgrade: h2c",
    "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)


def request(body: dict[str, Any], *headers: str) -> bytes:
    """A completion's request, as it goes over the wire."""
    text = json.dumps(body).encode()
    lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers)
    return "\r\n".join((*lines, f"content-length: {len(text)}", "", "")).encode() + text


def chunked(*headers: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", *headers)
    return "\r\n".join((*lines, "transfer-encoding: chunked", "", "")).encode()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.address, timeout=20)


def reply(raw: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the next reply, which must have a Content-Length."""
    file = raw.makefile("rb", buffering=0)  # what comes after it is the next one's
    status = int(file.readline().split()[1])
    headers = {}
    for line in iter(file.readline, b"\r\n"):
        assert line, "the connection ended in the middle of a reply"
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    body = b""
    while len(body) < int(headers["content-length"]):
        piece = file.read(int(headers["content-length"]) - len(body))
        assert piece, "the connection ended in the middle of a reply"
        body += piece
    return status, json.loads(body)


def closed(raw: socket.socket) -> bool:
    """Whether the server ends the connection, now or within the socket's timeout."""
    try:
        return raw.recv(1) == b""
    except ConnectionError:
        return True


def refusal(found: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    """Status and message of an error, which must have OpenAI's form."""
    status, body = found
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    return status, body["error"]["message"]
