"""Whether the processes that make a clip together still live: a thread in each, and a connection from the first to
every other. Needs no PyTorch.

A process that dies closes its connection, whatever kills it, and one whose machine is gone is missed within a minute.
The first process asks the others how many operations they have begun, so that it can name one that hangs. What
goes wrong is told to all: the others end at once, the first when it has written what is finished.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import platform
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from wan.device.peers import Ended, Peer, connect
from wan.errors import UserError

log = logging.getLogger(__name__)

SETTLE = 1.0  # seconds from a fault's first sign to the verdict: what follows from it may be heard earlier
LEAVE = 30.0  # seconds for the first process to end what it does, before it is ended
AGAIN = "what is finished is kept; give the same command again"

Kind = Literal["died", "failed", "hung", "waited", "signal"]
_FIRST_COUNTS: tuple[Kind, ...] = ("died", "failed", "hung", "waited", "signal")


@dataclass(frozen=True)
class Sign:
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
            "died": f"{name} has died: it was killed, is out of memory, or its machine is gone",
            "failed": f"{name} has failed: {self.what}",
            "hung": f"{name} lets the others wait for more than {self.what} s (`collective_timeout`)",
            "waited": f"{name} could not go on with the others: {self.what}",
            "signal": f"{name} was stopped by {_signal_name(self.number)}",
        }[self.kind]
        return f"{event}; {AGAIN}"


class Findings:
    """What the first process has seen go wrong, and which of it is the cause of the rest. For several threads.

    A process that lets the others wait for more than `timeout` seconds hangs.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._signs: list[Sign] = []
        self._due: float | None = None
        self._lock = threading.Lock()
        self._counts: list[int] = []  # of operations that were begun, as they were compared last
        self._changed = 0.0

    def note(self, sign: Sign) -> None:
        """Something was seen; what follows from it, or is its cause, may be seen until it is time for a verdict."""
        with self._lock:
            self._signs.append(sign)
            if self._due is None:
                self._due = time.monotonic() + SETTLE

    def hear(self, peer: Peer, message: Mapping[str, Any]) -> None:
        """Take in what another process says."""
        if "begun" in message:
            peer.begun = message["begun"]
            return
        peer.has_said_why = True
        if "failed" in message:
            kind: Kind = "waited" if message["waits"] else "failed"
            self.note(Sign(kind, peer.rank, peer.host, message["failed"]))
        elif "signal" in message:
            self.note(Sign("signal", peer.rank, peer.host, number=message["signal"]))

    def compare(self, begun: int, peers: Sequence[Peer], now: float) -> None:
        """Look for who hangs; `begun` are the first process's operations, and peers say theirs now and then."""
        counts, given = [begun, *(peer.begun for peer in peers)], f"{self.timeout:g}"
        if counts != self._counts or len(set(counts)) == 1:
            self._counts, self._changed = counts, now
        for peer in peers:
            if now - peer.heard > self.timeout + 1:
                self.note(Sign("hung", peer.rank, peer.host, given))
        if now - self._changed > self.timeout:
            names = [(0, platform.node()), *((peer.rank, peer.host) for peer in peers)]
            self.note(Sign("hung", *names[counts.index(min(counts))], given))

    def is_due(self, now: float) -> bool:
        """Whether it is time for a verdict."""
        with self._lock:
            return self._due is not None and now >= self._due

    @property
    def cause(self) -> Sign:
        """What the rest follows from."""
        with self._lock:
            return min(self._signs, key=lambda one: (_FIRST_COUNTS.index(one.kind), one.rank))


class Signals:
    """Signals of this process, heard by a thread too: Python itself hears of none while it waits in an operation.

    `is_leaving` tells whether the process is on its way out, where another signal changes nothing; it may raise.
    """

    def __init__(self, is_leaving: Callable[[], bool]) -> None:
        self._is_leaving = is_leaving
        self._wake, self.woken = socket.socketpair()
        for one in (self._wake, self.woken):
            one.setblocking(False)
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        """Begin to hear; in another thread than the main one there is nothing to hear."""
        if threading.current_thread() is threading.main_thread():
            self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._at_signal)

    def give_back(self) -> None:
        """All as it was before."""
        if self._before and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _at_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_leaving():
            return
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        else:
            raise KeyboardInterrupt(number)

    def read(self) -> list[int]:
        """Those that have come, as far as they stop a process; for the thread, when `woken` can be read."""
        try:
            return [number for number in self.woken.recv(64) if number in _STOPS]
        except BlockingIOError:
            return []

    def wake(self) -> None:
        """Let the thread look up."""
        with contextlib.suppress(BlockingIOError):  # it is full, so the thread is awake
            self._wake.send(b"\0")

    def interrupt(self) -> None:
        """Bring the main thread out of what it waits for, a file or the network, too."""
        if not self._before:
            return
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)
        else:  # Windows
            _thread.interrupt_main(signal.SIGTERM)


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
    _peers: list[Peer] = field(default_factory=list)
    _closed: bool = False
    _decided: threading.Event = field(default_factory=threading.Event)
    _out: threading.Event = field(default_factory=threading.Event)  # this process is on its way out by itself
    _ended: threading.Event = field(default_factory=threading.Event)  # the first process has said so

    def __post_init__(self) -> None:
        self.findings, self._signals = Findings(self.timeout), Signals(self._is_leaving)

    def start(self, share: Callable[[Callable[[], tuple[int, str]]], tuple[int, str]], address: str) -> None:
        """Connect with the others, see `connect`, and begin."""
        self._peers = connect(self.rank, self.size, share, address, self.timeout)
        self._signals.take()
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
            self._note(Sign("waited", 0, platform.node(), " ".join(str(error).split())[:300]))
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
        self._signals.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self._signals.give_back()

    def _tell_all(self, **message: Any) -> None:
        for peer in self._peers:
            peer.say(**message)

    def _is_leaving(self) -> bool:
        """When a signal comes: whether this process is on its way out, on which the fault of another sends it.

        A launcher that saw a process die stops the others, also while this one waits to hear which of them it was.
        """
        if self._out.is_set():
            return True
        if self.fault is None:
            return False
        self._out.set()
        raise Ended(self.fault)

    # --- of the thread

    def _lead(self) -> None:
        every = min(5.0, max(0.2, self.timeout / 8))
        asked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.woken, selectors.EVENT_READ)
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
                    self.findings.compare(self.begun(), self._peers, now)
                if self.findings.is_due(now):
                    self._decide()
        if self._decided.is_set() and not self._out.wait(LEAVE):
            self._leave_now()

    def _hear(self, peer: Peer) -> bool:
        """Whether there is more to come."""
        messages = peer.read()
        if messages is None and not peer.has_said_why and not self._closed:
            self.findings.note(Sign("died", peer.rank, peer.host))
        for message in messages or ():
            self.findings.hear(peer, message)
        return messages is not None

    def _note(self, sign: Sign) -> None:
        self.findings.note(sign)
        self._signals.wake()

    def _decide(self) -> None:
        """What is the cause of all that was seen; all are told."""
        sign = self.findings.cause
        if sign.kind == "signal":
            self.stopped = sign.number
        if sign.kind != "signal" or sign.rank:
            self.fault = sign.line
        self._decided.set()
        self._tell_all(end=True)
        threading.Thread(target=self.abort, daemon=True, name="abort").start()
        if self.fault is not None:
            self._signals.interrupt()

    def _leave_now(self) -> None:
        """End a process that waits for what does not come. Files are whole or not there, so nothing is lost by it."""
        if self.fault is not None:
            log.error("%s", self.fault)
        logging.shutdown()
        os._exit(2 if self.stopped is None else 128 + self.stopped)

    def _read_signals(self) -> None:
        for number in self._signals.read():
            if self.rank:
                self._peers[0].say(signal=number)
                time.sleep(SETTLE)  # what it does may end by itself
                os._exit(128 + number)
            self._note(Sign("signal", 0, platform.node(), number=number))

    def _follow(self) -> None:
        first = self._peers[0]
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.woken, selectors.EVENT_READ)
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
            log.error("%s", Sign(kind, 0, self._peers[0].host, f"{self.timeout:g}").line)
        logging.shutdown()
        os._exit(1)


_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_WORDS = ("gloo", "nccl", "process group", "communicator")  # of errors of operations that several processes share


def is_collective(error: BaseException) -> bool:
    """Whether an error is that of an operation with other processes, so that its cause is likely there."""
    if "DistError" in (one.__name__ for one in type(error).__mro__):  # PyTorch's
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def _number_of(error: KeyboardInterrupt) -> int:
    return int(error.args[0]) if error.args else int(signal.SIGINT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
