"""The connections between the first of the processes that make a clip together and every other. Needs no PyTorch."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wan.errors import UserError

# A machine that is gone is missed after 25 s, whether something was being sent to it or not. With `watch.LEAVE` all
# have ended within a minute.
MISSED = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 25_000}


class Ended(UserError):
    """Another process has failed, or does not come."""


@dataclass
class Peer:
    """The other end of a connection: which process that is, and what it last said."""

    connection: socket.socket
    rank: int
    host: str
    heard: float
    begun: int = 0  # operations, as it said
    unread: bytes = b""
    has_said_why: bool = False  # so that the end of the connection is no news

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # its end is heard of where connections are read
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None where the connection has ended."""
        try:
            new = self.connection.recv(1 << 16)
        except OSError:
            new = b""
        if not new:
            return None
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + new).split(b"\n")
        return [json.loads(line) for line in lines]


def connect(
    rank: int,
    size: int,
    share: Callable[[Callable[[], tuple[int, str]]], tuple[int, str]],
    address: str,
    timeout: float,
) -> list[Peer]:
    """In the first process all others, in another one the first. `share` is `Team.share`, and `address` is where the
    first process can be reached. Raises UserError where some do not come within `timeout` seconds."""
    if rank:
        port, key = share(lambda: (0, ""))
        connection = socket.create_connection((address, port), timeout=timeout)
        first = Peer(_kept_alive(connection), 0, address, time.monotonic())
        first.say(rank=rank, host=platform.node(), key=key)
        return [first]
    peers: list[Peer] = []
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server(("", 0), family=family, backlog=size) as listener:
        key = secrets.token_hex(16)  # whoever else finds the port does not have it
        listener.settimeout(timeout)
        share(lambda: (listener.getsockname()[1], key))
        while len(peers) < size - 1:
            try:
                connection = listener.accept()[0]
            except TimeoutError as error:
                ranks = ", ".join(str(peer.rank) for peer in peers) or "none"
                raise Ended(
                    f"the processes did not all connect within {timeout:g} s (`collective_timeout`); there: {ranks}"
                ) from error
            peer = Peer(_kept_alive(connection), 0, "", time.monotonic())
            if _is_known(peer, key):
                peers.append(peer)
            else:
                connection.close()
    return peers


def _is_known(peer: Peer, key: str) -> bool:
    """Whether a process that has connected is one of ours, which says who it is."""
    try:
        while b"\n" not in peer.unread and len(peer.unread) < 1000 and (new := peer.connection.recv(1000)):
            peer.unread += new
        first, _, peer.unread = peer.unread.partition(b"\n")
        hello = json.loads(first)
        known = secrets.compare_digest(str(hello["key"]).encode(), key.encode())
        peer.rank, peer.host = int(hello["rank"]), str(hello["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return known


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The kernel asks whether the other machine is there, also while the process itself is stopped."""
    connection.settimeout(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in MISSED.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
