"""The workers of a batch, on Ray: started where there are GPUs, given orders, watched and replaced.

This module alone imports Ray.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayError
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wan.batch.hand import WRITING, Hand
from wan.batch.places import choose_places
from wan.device.host import usable_cores
from wan.errors import UserError
from wan.options import Settings

log = logging.getLogger(__name__)

WORKER: Sequence[str] = (sys.executable, "-m", "wan.server.worker")
LOOK_SECONDS = 1.0  # from one look at a worker to the next
END_SECONDS = 10.0  # until an actor that was told to end its processes is killed
START_SECONDS = 60.0  # until a worker that waits for a GPU is worth a word
REACH_SECONDS = 10.0  # for the head of a cluster to answer, at first
HEAD_SECONDS = 20.0  # without the head until a batch ends: Ray itself ends this process after 60
HEAD_LOOK_SECONDS = 3.0  # from one look at it to the next, and for it to answer then
_PLACE = re.compile(r"(?:ray://)?(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})(?:/.*)?")
_OBJECTS = 100 << 20  # bytes of Ray's own store, of which words of some kB take nothing
_FRAMES = 2 << 30  # bytes of it where frames go to captioners: 70 MB a question at 1080p
_ASK_AGAIN = 2  # times, where a captioner dies of a question or with it

Kind: TypeAlias = Literal["ready", "ended", "written", "lost", "seen"]
_AT_WORK = ("ended", "written")


@dataclass(frozen=True)
class Event:
    """What became of a worker: it is ready, its order has ended, it is lost, or it was looked at.

    Where an order ended with `WRITING`, "written" comes later.
    """

    kind: Kind
    worker: int
    message: Mapping[str, Any]


@dataclass(frozen=True)
class _Line:
    """How a worker reaches a captioner."""

    captioner: Any

    async def __call__(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer: Mapping[str, Any] = await self.captioner.answer.remote(asked)
        except RayError as error:
            return {"failed": _reason(error)}
        return answer


class Gone(UserError):
    """Ray has gone, or this machine from it. Workers may be asked to stop, and nothing else."""


@dataclass
class _Member:
    hand: Any
    began: float
    looked: float = 0.0
    looking: bool = False
    waited: bool = False


class _Head:
    """The head of the cluster at an address, and this machine's part of the cluster, looked at now and then."""

    def __init__(self, address: str, ray: Any = ray) -> None:
        self.address, self.ray = address, ray
        self.gone = False
        self._seen = self._looked = time.monotonic()

    def look(self) -> None:
        """Raise Gone before Ray ends this process in words of its own, or lets it wait for ever."""
        now = time.monotonic()
        if self.gone or now - self._looked < HEAD_LOOK_SECONDS:
            return
        self._looked = now
        try:
            _reach(self.address, HEAD_LOOK_SECONDS)
        except OSError as error:
            if now - self._seen < HEAD_SECONDS:
                return
            self.gone = True
            raise Gone(
                f"the head of the Ray cluster, {self.address}, has gone ({error}); finished clips are kept, and the "
                "same command goes on when there is a cluster again"
            ) from error
        self._seen = now
        here = self.ray.get_runtime_context().get_node_id()
        if not any(node["Alive"] for node in self.ray.nodes() if node["NodeID"] == here):
            self.gone = True
            raise Gone(
                "this machine is no longer part of the Ray cluster, for its raylet has ended; finished clips are kept, "
                "and the same command goes on when ray status names this machine again"
            )


class Crew:
    """Workers 0 to `places.size` - 1. Raises UserError for a Ray that cannot be joined.

    `ray` is that module, or what stands for it in a test.
    """

    def __init__(self, settings: Settings, ray: Any = ray) -> None:
        self.ray = ray
        self.gpus_per_job, self.address = settings.gpus_per_job, settings.address
        self.threads = os.environ.get("OMP_NUM_THREADS")
        # nothing of what is made is anybody's business
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        before = signal.getsignal(signal.SIGTERM)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self.address is None:
                cores = max(usable_cores(), settings.workers or 1)
                objects = _FRAMES if settings.captioners else _OBJECTS
                store = {"object_store_memory": objects, "include_dashboard": False}
                self._context = self.ray.init(address="local", num_cpus=cores, **store, **quiet)
            else:
                _reach(self.address, REACH_SECONDS)
                self._context = self.ray.init(address=self.address, **quiet)
        except (RayError, ConnectionError, ValueError, RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            advice = "ray status"
            if self.address is not None:
                log_of_it = "ray_client_server.err among the head's logs"
                advice = log_of_it if self.address.startswith("ray://") else advice
                advice += ", and at RAY_AUTH_MODE and RAY_AUTH_TOKEN here if the cluster wants a token"
            raise UserError(
                f"`address` {self.address or 'of this machine'}: Ray cannot be used ({reason}); look at {advice}"
            ) from error
        except SystemExit:  # by SIGTERM, for which Ray has put a handler of its own there
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        try:
            nodes = [node for node in self.ray.nodes() if node["Alive"]]
            gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
            self.places = choose_places(settings, gpus)
            self._captioners = [self._captioner(node) for node in self.places.captioners]
        except BaseException:
            self.ray.shutdown()
            raise
        self._members: dict[int, _Member] = {}
        self._futures: dict[Any, tuple[Kind, int]] = {}
        by_client = (self.address or "").startswith("ray://")
        self._head = _Head(str(self.address if by_client else self.ray.get_runtime_context().gcs_address), ray)
        self._by_client = by_client

    @property
    def is_connected(self) -> bool:
        """Whether anything can be asked of Ray. With ray:// it cannot when the cluster's client server has gone."""
        return not self._by_client or client.is_connected()

    @property
    def dashboard(self) -> str:
        """The address of Ray's own page, where the cluster has one."""
        return str(getattr(self._context, "dashboard_url", None) or "")

    def _captioner(self, node: str) -> Any:
        """A captioner on a machine; Ray starts it again where it dies, elsewhere where its machine has gone."""
        # no cores: where it is started again a worker that waited must not have taken its place
        options: dict[str, Any] = {"num_gpus": 1 if self.places.uses_gpus else 0, "num_cpus": 0}
        options |= {"max_restarts": -1, "max_task_retries": _ASK_AGAIN}
        if node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        threads = int(self.threads or max(1, usable_cores() // self.places.siblings))
        from wan.batch.describer import Describer  # which needs PyTorch

        return self.ray.remote(Describer).options(**options).remote(threads)

    def open(self, worker: int) -> None:
        """Start a worker, or the one in place of it; an event tells when it is ready."""
        resources: dict[str, Any] = {"num_gpus": self.gpus_per_job if self.places.uses_gpus else 0, "num_cpus": 1}
        # the processes of a worker are of one actor, which Ray places on one machine
        hand = self.ray.remote(Hand).options(max_restarts=0, max_task_retries=0, **resources)
        captioners = self._captioners
        line = _Line(captioners[worker % len(captioners)]) if captioners else None
        started = hand.remote(WORKER, self.gpus_per_job, self.places.siblings, os.getcwd(), self.threads, line)
        member = self._members[worker] = _Member(started, began=time.monotonic())
        self._futures[member.hand.start.remote()] = "ready", worker

    def give(self, worker: int, order: Mapping[str, Any]) -> None:
        """Let a worker make or check a chain; an event tells what came of it."""
        self._futures[self._members[worker].hand.do.remote(dict(order))] = "ended", worker

    def wait(self, seconds: float) -> list[Event]:
        """What has happened, after so many seconds at most. Raises Gone."""
        self._head.look()
        self._look()
        if not self._futures:
            time.sleep(seconds)
            return []
        try:
            done, _ = self.ray.wait(list(self._futures), num_returns=1, timeout=seconds)
            more, _ = self.ray.wait(list(self._futures), num_returns=len(self._futures), timeout=0)
        except (RayError, ConnectionError) as error:
            self._head.gone = True
            raise Gone(f"Ray has gone ({_reason(error)}); the same command goes on") from error
        events = []
        for future in dict.fromkeys([*done, *more]):
            if future not in self._futures:  # of a worker that was lost a moment ago
                continue
            kind, worker = self._futures.pop(future)
            try:
                message: Mapping[str, Any] = self.ray.get(future)
            except RayError as error:
                self._forget(worker)
                events.append(Event("lost", worker, {"reason": _reason(error)}))
                continue
            if kind == "seen":
                self._members[worker].looking = False
            if kind == "ended" and message["state"] == WRITING:
                if ("written", worker) in self._futures.values():  # that of the order before; it is on its way
                    self._futures[future] = kind, worker
                    continue
                self._futures[self._members[worker].hand.written.remote()] = "written", worker
            if kind == "ready" and "error" in message:
                self.drop(worker)
                events.append(Event("lost", worker, {"reason": message["error"]}))
            else:
                events.append(Event(kind, worker, message))
        return events

    def _look(self) -> None:
        now = time.monotonic()
        busy = {worker for kind, worker in self._futures.values() if kind in _AT_WORK}
        for worker, member in self._members.items():
            if worker in busy and not member.looking and now - member.looked >= LOOK_SECONDS:
                member.looking, member.looked = True, now
                self._futures[member.hand.look.remote()] = "seen", worker
        for kind, worker in self._futures.values():
            member = self._members[worker]
            if kind == "ready" and not member.waited and now - member.began > START_SECONDS:
                member.waited = True
                log.warning("worker %d waits for a place in the cluster, or for its libraries to load", worker)

    def drop(self, worker: int) -> None:
        """End a worker, whatever it does."""
        hand = self._members[worker].hand
        self._forget(worker)
        try:
            # a process that hangs does not see that its actor has gone
            self.ray.get(hand.end.remote(), timeout=END_SECONDS)
        except (RayError, TimeoutError):
            log.debug("worker %d could not end its processes", worker)
        self.ray.kill(hand)

    def stop(self, seconds: float) -> list[Event]:
        """Let all workers leave what they make, and hear of those that have within so many seconds."""
        if not self.is_connected:
            return []
        for member in self._members.values():
            member.hand.stop.remote()
        events, end = list[Event](), time.monotonic() + seconds
        while any(kind in _AT_WORK for kind, _ in self._futures.values()) and time.monotonic() < end:
            try:
                events += self.wait(0.2)
            except Gone:  # which is said already, or is no news to who stops
                break
        return events

    def close(self) -> None:
        """End all workers, and Ray where it was started here."""
        if not self.is_connected:  # Ray ends the workers of a client that has gone
            return
        ends = [member.hand.end.remote() for member in self._members.values()]
        if ends:
            self.ray.wait(ends, num_returns=len(ends), timeout=END_SECONDS)
        if self._head.gone:  # what follows would wait for the head; see `cli.batch_program`
            return
        for worker in list(self._members):
            self.ray.kill(self._members[worker].hand)
            self._forget(worker)
        for captioner in self._captioners:
            self.ray.kill(captioner)
        self.ray.shutdown()

    def _forget(self, worker: int) -> None:
        self._members.pop(worker, None)
        self._futures = {future: order for future, order in self._futures.items() if order[1] != worker}


def _reach(address: str, seconds: float) -> None:
    """Raise OSError for a machine and port where nobody listens: Ray itself would try for minutes."""
    if place := _PLACE.fullmatch(address):
        with socket.create_connection((place["host"].strip("[]"), int(place["port"])), timeout=seconds):
            pass


def _reason(error: Exception) -> str:
    """Why a worker is lost, in a line."""
    name = type(error).__name__
    cause = {
        "OutOfMemoryError": "its machine ran out of memory",
        "ActorDiedError": "its worker died",
        "ActorUnavailableError": "its machine cannot be reached",
        "NodeDiedError": "its machine has gone",
    }.get(name, name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = next(
        (line for line in lines if "cause" in line.lower() or "node" in line.lower()), lines[-1] if lines else ""
    )
    # what follows is Ray's list of what may be behind any death
    return f"{cause} ({why.partition(' Some common causes')[0][:300]})"
