"""Connections between processes that make a clip together: who is let in, what is heard, and who does not come."""

from __future__ import annotations

import json
import platform
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from wan.device.layers import layers_that_stay
from wan.device.peers import MISSED, Ended, Peer, connect


def pair() -> tuple[Peer, socket.socket]:
    one, other = socket.socketpair()
    return Peer(one, 3, "there", 5.0), other


def test_messages_are_heard_whole_however_they_come() -> None:
    peer, other = pair()
    with other, peer.connection:
        assert (peer.begun, peer.has_said_why) == (0, False)
        other.sendall(b'{"a": 1}\n{"b"')
        before = time.monotonic()
        assert peer.read() == [{"a": 1}] and peer.heard >= before
        other.sendall(b": 2")
        assert peer.read() == []
        other.sendall(b"}\n")
        assert peer.read() == [{"b": 2}]
        peer.say(rank=1, host="x")
        assert other.recv(99) == b'{"rank": 1, "host": "x"}\n'
        heard = peer.heard
        other.close()
        assert peer.read() is None and peer.heard == heard
        peer.say(rank=1)  # to nobody
    assert peer.read() is None  # its own end is closed


class Meeting:
    """What the first process tells the others over the launcher's store: its port, and a key."""

    def __init__(self) -> None:
        self.told, self.value = threading.Event(), (0, "")

    def first(self, tell: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        self.value = tell()
        self.told.set()
        return self.value

    def other(self, tell: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        assert tell() == (0, "") and self.told.wait(10)
        return self.value


def meet(size: int, *, timeout: float, come: Callable[[Meeting], None]) -> list[Peer]:
    """The peers of the first process, while others come."""
    meeting = Meeting()
    coming = threading.Thread(target=come, args=(meeting,))
    coming.start()
    try:
        return connect(0, size, meeting.first, "127.0.0.1", timeout)
    finally:
        coming.join(10)


def test_processes_meet_and_know_each_other() -> None:
    others = list[Peer]()

    def come(meeting: Meeting) -> None:
        for rank in (2, 1):
            others.extend(connect(rank, 3, meeting.other, "127.0.0.1", 10))

    peers = meet(3, timeout=10, come=come)
    try:
        assert sorted((peer.rank, peer.host) for peer in peers) == [(1, platform.node()), (2, platform.node())]
        assert [(other.rank, other.host) for other in others] == [(0, "127.0.0.1")] * 2
        peers[0].say(why="x")
        first = others[0] if peers[0].rank == 2 else others[1]
        assert first.read() == [{"why": "x"}]
        for peer in (*peers, *others):
            one = peer.connection
            assert one.gettimeout() == 10 and one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for name, value in MISSED.items():
                if hasattr(socket, name):
                    assert one.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
    finally:
        for peer in (*peers, *others):
            peer.connection.close()


@pytest.mark.parametrize(
    "hello",
    [
        lambda key: {"rank": 1, "host": "x", "key": "another"},
        lambda key: {"rank": "one", "host": "x", "key": key},
        lambda key: {"host": "x", "key": key},
        lambda key: {"rank": 1, "host": "x"},
        lambda key: [key],
        lambda key: "x" * 3000,
        lambda key: None,
    ],
)
def test_who_does_not_know_the_key_is_no_peer(hello: Callable[[str], Any]) -> None:
    ends = list[bytes]()

    def come(meeting: Meeting) -> None:
        port, key = meeting.other(lambda: (0, ""))
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            words = hello(key)
            if words is None:
                stranger.shutdown(socket.SHUT_WR)
            else:
                stranger.sendall(json.dumps(words).encode() + b"\n")
            try:
                ends.append(stranger.recv(1))
            except ConnectionResetError:
                ends.append(b"")

    with pytest.raises(Ended, match=r"did not all connect within 0.1 s \(collective_timeout\); there: none"):
        meet(2, timeout=0.1, come=come)
    assert ends == [b""]


def test_those_that_came_are_named_when_others_do_not() -> None:
    others = list[Peer]()

    def come(meeting: Meeting) -> None:
        others.extend(connect(2, 3, meeting.other, "127.0.0.1", 10))

    with pytest.raises(Ended, match="there: 2$"):
        meet(3, timeout=0.1, come=come)
    others[0].connection.close()


@pytest.mark.parametrize(
    ("weights", "layer", "count", "budget", "stay"),
    [
        (100, 10, 8, None, 8),
        (100, 10, 8, 100, 8),
        (100, 10, 8, 99, 5),  # of seven, two are for those that come and go
        (100, 10, 8, 90, 5),
        (100, 10, 8, 89, 4),
        (100, 10, 8, 40, 0),
        (100, 10, 8, 39, -1),
        (100, 10, 0, 5, 0),
    ],
)
def test_as_many_layers_stay_as_there_is_room_for(
    weights: int, layer: int, count: int, budget: int | None, stay: int
) -> None:
    assert layers_that_stay(weights, layer, count, budget) == stay
