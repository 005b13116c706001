"""Whether the processes that make a clip together still live: a thread in each, and a connection from the first to
every other. Needs no PyTorch.

A process that dies closes its connection, whatever kills it, and one whose machine is gone is missed within a minute.
The first process asks the others how many operations they have begun together, so that it can name one that hangs. What
goes wrong is told to all: the others end at once, the first one when it has written what is finished.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import json
import logging
import os
import platform
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from wan.errors import UserError

log = logging.getLogger(__name__)

SETTLE = 1.0  # seconds from the first sign of a fault to the verdict: what follows from it may be heard of earlier
LEAVE = 30.0  # seconds in which the first process comes out of what it does, before it is ended
# A machine that is gone is missed after 40 s, whether something was being sent to it or not.
MISSED = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 40_000}
AGAIN = "what is finished is kept; give the same command again"

Kind = Literal["died", "failed", "hung", "waited", "signal"]
_FIRST_COUNTS: tuple[Kind, ...] = ("died", "failed", "hung", "waited", "signal")


class Ended(UserError):
    """Another process has failed, or does not come."""


@dataclass(frozen=True)
class _Sign:
    """What was seen of a process: `kind`, the first of which in `_FIRST_COUNTS` is the cause of the others."""

    kind: Kind
    rank: int
    host: str
    what: str = ""
    number: int = 0  # of the signal

    @property
    def line(self) -> str:
        name = f"process {self.rank} on {self.host}"
        event = {
            "died": f"{name} has died: it was killed, or is out of memory",
            "failed": f"{name} has failed: {self.what}",
            "hung": f"{name} lets the others wait for more than {self.what} s (`collective_timeout`)",
            "waited": f"{name} could not go on with the others: {self.what}",
            "signal": f"{name} was stopped by {_signal_name(self.number)}",
        }[self.kind]
        return f"{event}; {AGAIN}"


@dataclass
class _Peer:
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


@dataclass
class Watch:
    """The thread of one process. `begun`: how many operations this process has begun with others so far; `abort` lets
    one that waits in such an operation go on with an error, where that can be.

    `timeout`: seconds that one process may let the others wait. `fault` is the line of what went wrong, `stopped` the
    signal that this process was stopped by.
    """

    rank: int
    size: int
    begun: Callable[[], int]
    abort: Callable[[], None]
    timeout: float
    fault: str | None = None
    stopped: int | None = None
    _peers: list[_Peer] = field(default_factory=list)
    _signs: list[_Sign] = field(default_factory=list)
    _before: dict[int, Any] = field(default_factory=dict)
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decided: threading.Event = field(default_factory=threading.Event)
    _out: threading.Event = field(default_factory=threading.Event)  # this process is on its way out by itself
    _ended: threading.Event = field(default_factory=threading.Event)  # the first process has said so

    def start(self, share: Callable[[Callable[[], tuple[int, str]]], tuple[int, str]], address: str) -> None:
        """Connect with the others. `share` is `Team.share`, and `address` is where the first process can be reached."""
        self._wake, self._woken = socket.socketpair()
        for one in (self._wake, self._woken):
            one.setblocking(False)
        if self.rank == 0:
            family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server(("", 0), family=family, backlog=self.size) as listener:
                key = secrets.token_hex(16)  # whoever else finds the port does not have it
                listener.settimeout(self.timeout)
                share(lambda: (listener.getsockname()[1], key))
                while len(self._peers) < self.size - 1:
                    self._accept(listener, key)
        else:
            port, key = share(lambda: (0, ""))
            connection = socket.create_connection((address, port), timeout=self.timeout)
            self._peers = [_Peer(_kept_alive(connection), 0, address, time.monotonic())]
            self._peers[0].say(rank=self.rank, host=platform.node(), key=key)
        self._take_signals()
        self._thread = threading.Thread(
            target=self._lead if self.rank == 0 else self._follow, daemon=True, name="watch"
        )
        self._thread.start()
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        """A process that ends without a word to the others: by itself, or by an error that nothing has caught."""
        error = getattr(sys, "last_value", None)
        if error is None:
            self.close()
        elif not self._closed:
            self.end(error)

    def _accept(self, listener: socket.socket, key: str) -> None:
        """The next process that connects; whoever else does is turned away. Raises UserError."""
        try:
            connection = listener.accept()[0]
        except TimeoutError as error:
            ranks = ", ".join(str(peer.rank) for peer in self._peers) or "none"
            raise Ended(
                f"the processes did not all connect within {self.timeout:g} s (`collective_timeout`); there: {ranks}"
            ) from error
        peer = _Peer(_kept_alive(connection), 0, "", time.monotonic())
        try:
            while b"\n" not in peer.unread and len(peer.unread) < 1000 and (new := connection.recv(1000)):
                peer.unread += new
            first, _, peer.unread = peer.unread.partition(b"\n")
            hello = json.loads(first)
            known = secrets.compare_digest(str(hello["key"]).encode(), key.encode())
            peer.rank, peer.host = int(hello["rank"]), str(hello["host"])
        except (OSError, ValueError, TypeError, KeyError):
            known = False
        if not known:
            connection.close()
            return
        self._peers.append(peer)

    # --- of the process's own thread

    def end(self, error: BaseException) -> BaseException:
        """Tell the others that this process goes no further; returns the error to raise, which may be another's."""
        self._out.set()
        waits = is_collective(error)
        if self.rank and isinstance(error, Ended):
            return error
        if self.rank:
            if isinstance(error, KeyboardInterrupt):
                self._peers[0].say(signal=_number_of(error))
            else:
                what = f"{error.marked if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}"
                self._peers[0].say(failed=" ".join(what.split())[:300], waits=waits)
            if waits:
                self._ended.wait(LEAVE)  # the first process says why, and ends this one
            return error
        if waits:
            self._note(_Sign("waited", 0, platform.node(), " ".join(str(error).split())[:300]))
        if waits or isinstance(error, KeyboardInterrupt):
            self._decided.wait(10 * SETTLE)
        if self.fault is not None and (waits or isinstance(error, KeyboardInterrupt)):
            error = Ended(self.fault)
        self._tell_all(end=True)
        self.close()
        return error

    def close(self) -> None:
        """Leave: the end of a connection means nothing from now on."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._tell_all(done=True)
        self._wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self._give_signals_back()

    def _tell_all(self, **message: Any) -> None:
        for peer in self._peers:
            peer.say(**message)

    def _take_signals(self) -> None:
        """Hear of signals also while the process waits in an operation, where Python itself does not."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._at_signal)

    def _give_signals_back(self) -> None:
        if self._before and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _at_signal(self, number: int, frame: FrameType | None) -> None:
        if self.fault is not None:
            if not self._out.is_set():
                self._out.set()
                raise Ended(self.fault)
            return  # it is on its way out
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        else:
            raise KeyboardInterrupt(number)

    # --- of the thread

    def _lead(self) -> None:
        every = min(5.0, max(0.2, self.timeout / 8))
        asked = changed = time.monotonic()
        counts: list[int] = []
        verdict_at = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
                peer.heard = asked
            while not self._closed and not self._decided.is_set():
                for key, _ in selector.select(min(every, SETTLE / 4)):
                    if key.data is None:
                        self._read_signals()
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - asked >= every:
                    asked = now
                    self._tell_all(ask=True)
                    begun = [self.begun(), *(peer.begun for peer in self._peers)]
                    if begun != counts or len(set(begun)) == 1:
                        counts, changed = begun, now
                    self._find_hanging(begun, now - changed, now)
                with self._lock:
                    if self._signs and verdict_at is None:
                        verdict_at = now + SETTLE
                if verdict_at is not None and now >= verdict_at:
                    self._decide()
        if self._decided.is_set() and not self._out.wait(LEAVE):
            self._leave_now()

    def _find_hanging(self, counts: list[int], unchanged: float, now: float) -> None:
        given = f"{self.timeout:g}"
        for peer in self._peers:
            if now - peer.heard > self.timeout + 1:
                self._note(_Sign("hung", peer.rank, peer.host, given))
        if unchanged > self.timeout:
            least = counts.index(min(counts))
            peer_of = [(0, platform.node()), *((peer.rank, peer.host) for peer in self._peers)]
            self._note(_Sign("hung", *peer_of[least], given))

    def _hear(self, peer: _Peer) -> bool:
        messages = peer.read()
        if messages is None:
            if not peer.has_said_why and not self._closed:
                self._note(_Sign("died", peer.rank, peer.host))
            return False
        for message in messages:
            if "begun" in message:
                peer.begun = message["begun"]
            elif "failed" in message:
                kind: Kind = "waited" if message["waits"] else "failed"
                self._note(_Sign(kind, peer.rank, peer.host, message["failed"]))
            elif "signal" in message:
                self._note(_Sign("signal", peer.rank, peer.host, number=message["signal"]))
            peer.has_said_why |= not message.keys() & {"begun"}
        return True

    def _note(self, sign: _Sign) -> None:
        with self._lock:
            self._signs.append(sign)
        self._wake_up()

    def _decide(self) -> None:
        """What is the cause of all that was seen; all are told."""
        with self._lock:
            sign = min(self._signs, key=lambda one: (_FIRST_COUNTS.index(one.kind), one.rank))
        if sign.kind == "signal":
            self.stopped = sign.number
        if sign.kind != "signal" or sign.rank:
            self.fault = sign.line
        self._decided.set()
        self._tell_all(end=True)
        threading.Thread(target=self.abort, daemon=True, name="abort").start()
        if self.fault is not None and self._before:
            # out of a wait for a file or the network, too
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)
            else:  # Windows
                _thread.interrupt_main(signal.SIGTERM)

    def _leave_now(self) -> None:
        """End a process that waits for what does not come. Files are whole or not there, so nothing is lost by it."""
        if self.fault is not None:
            log.error("%s", self.fault)
        logging.shutdown()
        os._exit(2 if self.stopped is None else 128 + self.stopped)

    def _read_signals(self) -> None:
        try:
            numbers = [number for number in self._woken.recv(64) if number in _STOPS]
        except BlockingIOError:
            return
        for number in numbers:
            if self.rank:
                self._peers[0].say(signal=number)
                time.sleep(SETTLE)  # what it does may end by itself
                os._exit(128 + number)
            self._note(_Sign("signal", 0, platform.node(), number=number))

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full, so the thread is awake
            self._wake.send(b"\0")

    def _follow(self) -> None:
        first = self._peers[0]
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(first.connection, selectors.EVENT_READ, first)
            while not self._closed:
                for key, _ in selector.select(1.0):
                    if key.data is None:
                        self._read_signals()
                        continue
                    messages = first.read()
                    if messages is None and not self._closed:
                        self._go_without_first("died")
                    for message in messages or ():
                        self._obey(message)
                if time.monotonic() - first.heard > self.timeout + 10:
                    self._go_without_first("hung")

    def _obey(self, message: Mapping[str, Any]) -> None:
        if "ask" in message:
            self._peers[0].say(begun=self.begun())
        elif "done" in message:
            self._closed = True
        elif "end" in message:
            self._ended.set()
            # a traceback may be on its way to stderr
            self._out.wait(0.2)
            time.sleep(SETTLE if self._out.is_set() else 0)
            os._exit(1)

    def _go_without_first(self, kind: Kind) -> None:
        if self.rank == 1:  # one of them says it
            log.error("%s", _Sign(kind, 0, self._peers[0].host, f"{self.timeout:g}").line)
        logging.shutdown()
        os._exit(1)


_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_WORDS = ("gloo", "nccl", "process group", "communicator")  # of errors of operations that several processes share


def is_collective(error: BaseException) -> bool:
    """Whether an error is that of an operation with other processes, so that its cause is likely there."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def _number_of(error: KeyboardInterrupt) -> int:
    return int(error.args[0]) if error.args else int(signal.SIGINT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The kernel asks whether the other machine is there, also while the process itself is stopped."""
    connection.settimeout(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in MISSED.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
