"""Takes the address that a server is to listen at, before anything that takes long."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to an address and port, one for each address that the host has here.

    They do not listen yet: until `listen` a client is refused, so that nobody takes a server that loads for one that
    serves. Port 0 is any that is free.

    Raises:
        ValueError: not an address of this machine, or a port that can't be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is not known ({error}): give an address or a name of this machine") from None
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        chosen = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_socket(family, kind, protocol, (address[0], chosen, *address[2:])))
        except OSError as error:
            # A name such as localhost may have an address of a family that is switched off here.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            _close(sockets)
            raise _refusal(host, port, error) from None
    if not sockets:
        assert missing is not None
        raise _refusal(host, port, missing)
    return sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let clients connect; raises ValueError if somebody else has come to listen there."""
    for one in sockets:
        host, port = one.getsockname()[:2]
        try:
            one.listen(BACKLOG)
        except OSError as error:
            raise _refusal(host, port, error) from None


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """The sockets of `bind`, which raises ValueError; closed afterwards."""
    sockets = bind(host, port)
    try:
        yield sockets
    finally:
        _close(sockets)


def _close(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        one.close()


def _socket(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would take ports that others use
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _refusal(host: str, port: int, error: OSError) -> ValueError:
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"--port {port} is in use at {host}: stop what listens there, or give another port")
    if error.errno == errno.EACCES:
        return ValueError(f"--port {port} is not allowed to this user: give a port from 1024 on")
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return ValueError(f"--host {host} is not this machine's: give 127.0.0.1, or 0.0.0.0 for all of its addresses")
    return ValueError(f"--host {host} --port {port} can't be listened at ({error}): give another address")
