"""The workers of a batch and the cluster that they are on, with a Ray that is made up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayError
from ray.util.client import ray as client

from wan.batch import crew
from wan.batch.crew import Crew, Event, Gone
from wan.batch.hand import WRITING
from wan.errors import UserError
from wan.options import Settings

A, B = "a" * 56, "b" * 56  # ids of machines


class Actor:
    """Stands for an actor: each call is kept and gives a future, which is the call's name with the actor's number."""

    def __init__(self, number: int, calls: list[Any]) -> None:
        self.number, self.calls, self.futures = number, calls, list[str]()

    def __getattr__(self, name: str) -> Any:
        def remote(*words: Any) -> str:
            self.calls.append((name, self.number, *words))
            self.futures.append(f"{name} {self.number}")
            count = self.futures.count(self.futures[-1])
            return self.futures[-1] + (f", {count}" if count > 1 else "")

        return SimpleNamespace(remote=remote)


class Ray:
    """Stands for the module: a cluster, a clock, what was asked, and the `results` that are there for a future."""

    def __init__(self) -> None:
        self.now, self.answers = 100.0, True
        self.error: Exception | None = None  # of `init`
        self.calls, self.results, self.started = list[Any](), dict[str, Any](), list[Any]()
        self.reached, self.waits, self.slept = list[tuple[str, float]](), list[Any](), list[float]()
        self.cluster = [self.node("other", 0), self.node("here", 0)]
        self.failing: Exception | None = None  # of `wait`

    @staticmethod
    def node(name: str, gpus: float, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 4.0} | ({"GPU": gpus} if gpus else {})}

    def reach(self, address: str, seconds: float) -> None:
        self.reached.append((address, seconds))
        if not self.answers:
            raise ConnectionRefusedError("nobody listens")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def init(self, **words: Any) -> Any:
        self.calls.append(("init", words))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def nodes(self) -> list[Any]:
        return self.cluster

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here", gcs_address="10.0.0.9:6379")

    def remote(self, kind: type) -> Any:
        def options(**given: Any) -> Any:
            def start(*words: Any) -> Actor:
                self.started.append((kind.__name__, given, words))
                return Actor(len(self.started) - 1, self.calls)

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def get(self, future: str, timeout: float | None = None) -> Any:
        self.waits.append((future, timeout))
        result = self.results.pop(future, None)
        if isinstance(result, Exception):
            raise result
        return result

    def wait(self, futures: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.waits.append((list(futures), num_returns, timeout))
        if self.failing is not None:
            raise self.failing
        return [future for future in futures if future in self.results][:num_returns], []

    def kill(self, actor: Actor) -> None:
        self.calls.append(("kill", actor.number))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(time, "monotonic", lambda: ray.now)
    monkeypatch.setattr(time, "sleep", ray.sleep)
    monkeypatch.setattr(crew, "_reach", ray.reach)
    monkeypatch.setattr(crew, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return ray


# --- the head


def test_the_head_is_looked_at_now_and_then(cluster: Ray) -> None:
    head = crew._Head("10.0.0.1:6379", cluster)
    cluster.now = 102.9
    head.look()
    assert not cluster.reached
    for cluster.now in (103.0, 104.0, 106.0):
        head.look()
    assert cluster.reached == [("10.0.0.1:6379", 3.0)] * 2 and not head.gone


def test_a_head_that_answers_again_has_not_gone(cluster: Ray) -> None:
    head = crew._Head("10.0.0.1:6379", cluster)
    cluster.answers = False
    cluster.now = 119.0
    head.look()
    cluster.answers, cluster.now = True, 122.0
    head.look()
    cluster.answers, cluster.now = False, 141.0  # 19 s after it answered
    head.look()
    assert not head.gone
    cluster.now = 144.0
    with pytest.raises(Gone, match=r"the head of the Ray cluster, 10.0.0.1:6379, has gone \(nobody listens\)"):
        head.look()
    cluster.now = 200.0
    head.look()  # it is said once
    assert head.gone and len(cluster.reached) == 4


def test_a_head_has_gone_after_twenty_seconds_without_an_answer(cluster: Ray) -> None:
    head = crew._Head("10.0.0.1:6379", cluster)
    cluster.answers, cluster.now = False, 120.0
    with pytest.raises(Gone):
        head.look()


def test_a_machine_that_is_no_longer_in_the_cluster_has_gone(cluster: Ray) -> None:
    head = crew._Head("10.0.0.1:6379", cluster)
    cluster.cluster[1]["Alive"], cluster.now = False, 103.0
    with pytest.raises(Gone, match="this machine is no longer part of the Ray cluster"):
        head.look()
    assert head.gone
    head = crew._Head("10.0.0.1:6379", cluster)
    cluster.cluster, cluster.now = cluster.cluster[:1], 106.0  # nor is it known any more
    with pytest.raises(Gone):
        head.look()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://127.0.0.1:{}/space"])
def test_where_nobody_listens_is_known_before_ray_is_asked(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        crew._reach(address.format(port), 1)
    with pytest.raises(OSError):
        crew._reach(address.format(port), 1)
    for other in ("auto", "local", "127.0.0.1", f"127.0.0.1:{port}0000"):  # which name no machine and port
        crew._reach(other, 1)


def test_an_address_of_ipv6_is_asked_without_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[Any, float]]()

    def connect(place: Any, timeout: float) -> socket.socket:
        asked.append((place, timeout))
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    crew._reach("[fd00::1]:6379", 7)
    assert asked == [(("fd00::1", 6379), 7)]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("OutOfMemoryError", "killed\n\n  on node 10.0.0.2\nlast", "its machine ran out of memory (on node 10.0.0.2)"),
        ("ActorDiedError", "first\nThe cause is known\nlast", "its worker died (The cause is known)"),
        ("ActorDiedError", "x\nNode: the end. Some common causes include: 1", "its worker died (Node: the end.)"),
        ("ActorUnavailableError", "first\nlast\n\n", "its machine cannot be reached (last)"),
        ("NodeDiedError", "", "its machine has gone ()"),
        ("Strange", "x" * 400, f"Strange ({'x' * 300})"),
    ],
)
def test_why_a_worker_is_lost_is_one_line(name: str, text: str, line: str) -> None:
    assert crew._reason(type(name, (Exception,), {})(text)) == line


# --- the crew


def test_ray_is_started_here_for_the_workers_and_nobody_else(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False, "address": "local"}
    for given, cores, store in (
        (Settings(), 12, 100 << 20),
        (Settings(workers=5), 12, 100 << 20),
        (Settings(workers=20), 20, 100 << 20),  # more than there are cores
        (Settings(captioners=1), 12, 2 << 30),  # which frames go to
    ):
        made = Crew(given, cluster)
        assert cluster.calls == [("init", quiet | {"num_cpus": cores, "object_store_memory": store})]
        assert not cluster.reached and made.is_connected and made.dashboard == "127.0.0.1:8265"
        cluster.calls.clear()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and made._head.address == "10.0.0.9:6379"


def test_a_cluster_that_is_there_is_joined_when_its_head_answers(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Crew(Settings(address="10.0.0.1:6379"), cluster)
    joined = {"address": "10.0.0.1:6379", "log_to_driver": False, "logging_level": logging.ERROR}
    assert cluster.reached == [("10.0.0.1:6379", 10.0)] and cluster.calls == [("init", joined)]
    monkeypatch.setattr(client, "is_connected", lambda: False)
    assert made._head.address == "10.0.0.9:6379" and made.is_connected
    by_client = Crew(Settings(address="ray://10.0.0.1:10001"), cluster)
    assert by_client._head.address == "ray://10.0.0.1:10001" and not by_client.is_connected
    monkeypatch.setattr(client, "is_connected", lambda: True)
    assert by_client.is_connected


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        (None, "of this machine: Ray cannot be used (it is broken in two); look at ray status"),
        (
            "10.0.0.1:6379",
            "10.0.0.1:6379: Ray cannot be used (it is broken in two); look at ray status, and at RAY_AUTH",
        ),
        (
            "ray://10.0.0.1:1",
            "ray://10.0.0.1:1: Ray cannot be used (it is broken in two); look at ray_client_server.err",
        ),
    ],
)
@pytest.mark.parametrize("kind", [RayError, ConnectionError, ValueError, RuntimeError, OSError, ImportError])
def test_a_ray_that_cannot_be_used_is_one_line_with_advice(
    kind: type[Exception], address: str | None, advice: str, cluster: Ray
) -> None:
    cluster.error = kind("it is broken\n in two")
    with pytest.raises(UserError) as refused:
        Crew(Settings(address=address), cluster)
    assert str(refused.value).startswith(f"address {advice}") and "shutdown" not in cluster.calls
    assert ("RAY_AUTH_TOKEN here" in str(refused.value)) is (address is not None)


def test_a_signal_ends_a_batch_also_while_ray_starts_and_after(cluster: Ray) -> None:
    ours, before = list[int](), signal.getsignal(signal.SIGTERM)

    def hear(number: int, _: Any) -> None:
        ours.append(number)

    def init(**_: Any) -> Any:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ray does
        if not ours:
            signal.raise_signal(signal.SIGTERM)

    cluster.init = init  # type: ignore[method-assign]
    try:
        signal.signal(signal.SIGTERM, hear)
        with pytest.raises(SystemExit):
            Crew(Settings(), cluster)
        assert ours == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is hear
        made = Crew(Settings(), cluster)
        assert signal.getsignal(signal.SIGTERM) is hear and made.dashboard == ""
        crews = list[Crew]()
        cluster.init = lambda **_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: crews.append(Crew(Settings(), cluster)))  # where no signal can be set
        thread.start()
        thread.join()
        assert len(crews) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_places_are_the_gpus_of_machines_that_live(cluster: Ray) -> None:
    cluster.cluster = [cluster.node(A, 4.0), cluster.node(B, 2.0), cluster.node("gone", 8.0, alive=False)]
    made = Crew(Settings(gpus_per_job=2, captioners=1), cluster)
    assert (made.places.size, made.places.siblings, made.places.uses_gpus) == (2, 1, True)
    (name, given, words), *more = cluster.started
    assert (name, given["scheduling_strategy"].node_id, given["num_gpus"], more) == ("Describer", A, 1, [])
    assert words == (12,) and given["max_restarts"] == -1 and given["max_task_retries"] == 2
    cluster.calls.clear()
    with pytest.raises(UserError, match="gpus_per_job 8 is more than a machine has; the most are 4"):
        Crew(Settings(gpus_per_job=8), cluster)
    assert cluster.calls[1:] == ["shutdown"]  # nothing is left of it


@pytest.fixture
def workers(cluster: Ray) -> Crew:
    """A crew with workers 0 and 1, which start. Nobody has looked at them."""
    made = Crew(Settings(workers=2), cluster)
    for worker in range(2):
        made.open(worker)
    assert cluster.calls[1:] == [("start", 0), ("start", 1)]
    cluster.calls.clear()
    cluster.waits.clear()
    return made


def are_ready(made: Crew, cluster: Ray) -> None:
    """Both have started."""
    cluster.results |= {"start 0": {"node": "a"}, "start 1": {"node": "b"}}
    assert [event.kind for event in made.wait(0)] == ["ready"] * 2
    cluster.waits.clear()


def facts(events: list[Event]) -> list[tuple[str, int, Any]]:
    return [(event.kind, event.worker, dict(event.message)) for event in events]


def looked(cluster: Ray) -> list[int]:
    """Whom somebody has looked at, taken out of the calls."""
    workers = [call[1] for call in cluster.calls if call[0] == "look"]
    cluster.calls[:] = [call for call in cluster.calls if call[0] != "look"]
    return workers


def test_workers_start_and_one_that_cannot_is_lost(workers: Crew, cluster: Ray) -> None:
    assert workers.wait(7) == []
    assert cluster.waits == [(["start 0", "start 1"], 1, 7), (["start 0", "start 1"], 2, 0)]
    cluster.results |= {"start 0": {"node": "a"}, "start 1": {"error": "no GPU"}}
    assert facts(workers.wait(1)) == [("ready", 0, {"node": "a"}), ("lost", 1, {"reason": "no GPU"})]
    assert cluster.calls == [("end", 1), ("kill", 1)] and ("end 1", 10.0) in cluster.waits
    cluster.calls.clear()
    assert workers.wait(3) == [] and cluster.slept == [3]  # nothing is asked of anybody
    workers.open(1)
    cluster.results["start 2"] = {"node": "a"}
    assert facts(workers.wait(1)) == [("ready", 1, {"node": "a"})]


def test_an_order_that_ended_with_writing_is_asked_about_again(workers: Crew, cluster: Ray) -> None:
    are_ready(workers, cluster)
    workers.give(0, {"id": "boat"})
    cluster.results["do 0"] = {"state": WRITING}
    assert [event.kind for event in workers.wait(1)] == ["ended"] and looked(cluster) == [0]
    assert cluster.calls == [("do", 0, {"id": "boat"}), ("written", 0)]
    # the next order ends while the one before is still being written: that is said first
    workers.give(0, {"id": "car"})
    workers.give(1, {"id": "sea"})
    cluster.results |= {"do 0, 2": {"state": WRITING}, "do 1": {"state": "completed"}}
    assert facts(workers.wait(1)) == [("ended", 1, {"state": "completed"})]
    cluster.results |= {"written 0": {"state": "completed"}, "do 0, 2": {"state": WRITING}}
    assert [event.kind for event in workers.wait(1)] == ["written", "ended"]
    cluster.results["written 0, 2"] = {"state": "failed"}
    assert facts(workers.wait(1)) == [("written", 0, {"state": "failed"})] and looked(cluster) == [1]


def test_another_worker_s_writing_does_not_hold_up_an_order(workers: Crew, cluster: Ray) -> None:
    are_ready(workers, cluster)
    for worker in (0, 1):
        workers.give(worker, {"id": "boat"})
        cluster.results[f"do {worker}"] = {"state": WRITING}
        assert facts(workers.wait(1)) == [("ended", worker, {"state": WRITING})]


def test_a_worker_at_work_is_looked_at_once_a_second(workers: Crew, cluster: Ray) -> None:
    are_ready(workers, cluster)
    workers.wait(1)
    assert looked(cluster) == []  # nobody does anything
    workers.give(0, {"id": "boat"})
    workers.wait(1)
    assert looked(cluster) == [0]
    cluster.now += 5
    workers.wait(1)
    assert looked(cluster) == []  # its answer is not here yet
    cluster.results["look 0"] = {"id": "boat"}
    assert facts(workers.wait(1)) == [("seen", 0, {"id": "boat"})]
    workers.wait(1)
    assert looked(cluster) == [0]
    for cluster.now, times in ((105.9, 0), (106.0, 1)):
        cluster.results["look 0, 2"] = {"id": "boat"}
        workers.wait(1)
        assert len(looked(cluster)) == times


def test_a_worker_that_writes_is_looked_at_and_one_that_starts_is_not(workers: Crew, cluster: Ray) -> None:
    cluster.results["start 0"] = {"node": "a"}
    workers.wait(1)
    workers.give(0, {"id": "boat"})
    cluster.results["do 0"] = {"state": WRITING}
    workers.wait(1)
    cluster.results["look 0"] = {"id": "boat"}
    workers.wait(1)
    looked(cluster)
    cluster.now += 2
    workers.wait(1)
    assert looked(cluster) == [0]


def test_a_worker_that_waits_long_for_its_place_is_worth_one_line(
    workers: Crew, cluster: Ray, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.results["start 0"] = {"node": "a"}
    workers.wait(0)
    workers.give(0, {"id": "boat"})  # which may take as long as it likes
    for cluster.now in (160.0, 160.1, 300.0):
        workers.wait(0)
        assert len(caplog.records) == (cluster.now > 160)
    assert "worker 1 waits for a place in the cluster" in caplog.text


def test_a_worker_that_dies_takes_all_that_was_asked_of_it_along_and_nobody_else(workers: Crew, cluster: Ray) -> None:
    are_ready(workers, cluster)
    workers.give(0, {"id": "boat"})
    cluster.results["do 0"] = {"state": WRITING}
    workers.wait(1)
    cluster.results["look 0"] = {"id": "boat"}
    workers.wait(1)
    cluster.now += 2  # so that both are looked at after their next orders
    for worker in (0, 1):
        workers.give(worker, {"id": "car"})
    cluster.results |= {"do 0, 2": RayError("it died"), "do 1": {"state": "completed"}}
    cluster.results |= {"look 0, 2": {"id": "boat"}, "look 1": {"id": "car"}}
    assert facts(workers.wait(1)) == [
        ("lost", 0, {"reason": "RayError (it died)"}),
        ("ended", 1, {"state": "completed"}),
        ("seen", 1, {"id": "car"}),
    ]
    cluster.results |= {"written 0": {"state": "completed"}}
    cluster.now += 9
    assert workers.wait(1) == []  # nor is there anything more of worker 0
    workers.open(0)
    cluster.results["start 2"] = {"node": "a"}
    assert [event.kind for event in workers.wait(1)] == ["ready"]


@pytest.mark.parametrize("failing", [RayError("it has\nleft"), ConnectionError("it has\nleft")])
def test_a_ray_that_breaks_off_has_gone(failing: Exception, workers: Crew, cluster: Ray) -> None:
    cluster.failing = failing
    with pytest.raises(Gone, match=r"Ray has gone \((RayError|ConnectionError) \(left\)\); the same command goes on"):
        workers.wait(1)
    cluster.failing, cluster.calls = None, []
    workers.close()  # and nothing waits for it
    assert [call[0] for call in cluster.calls] == []


def test_a_head_that_has_gone_is_heard_of_while_workers_are_waited_for(workers: Crew, cluster: Ray) -> None:
    cluster.answers, cluster.now = False, 200.0
    with pytest.raises(Gone, match="the head of the Ray cluster, 10.0.0.9:6379, has gone"):
        workers.wait(1)


def test_workers_that_stop_are_heard_for_a_while(workers: Crew, cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    are_ready(workers, cluster)
    for worker in (0, 1):
        workers.give(worker, {"id": "boat"})
    cluster.calls.clear()
    cluster.results["do 0"] = {"state": "cancelled"}
    wait = cluster.wait

    def waiting(futures: list[str], num_returns: int, timeout: float) -> Any:
        cluster.now += timeout
        return wait(futures, num_returns, timeout)

    monkeypatch.setattr(cluster, "wait", waiting)
    began = cluster.now
    assert facts(workers.stop(3)) == [("ended", 0, {"state": "cancelled"})]
    assert cluster.now == pytest.approx(began + 3, abs=0.21)  # worker 1 never ends
    assert [call for call in cluster.calls if call[0] == "stop"] == [("stop", 0), ("stop", 1)]
    cluster.results |= {"do 1": {"state": WRITING}}
    began = cluster.now
    assert [event.kind for event in workers.stop(5)] == ["ended"] and cluster.now >= began + 4.8  # until it is written
    cluster.results |= {"written 1": {"state": "completed"}}
    assert [event.kind for event in workers.stop(99)] == ["written"]
    began = cluster.now
    assert workers.stop(99) == [] and cluster.now == began


def test_a_crew_that_stops_waits_no_longer_for_a_cluster_that_has_gone(workers: Crew, cluster: Ray) -> None:
    are_ready(workers, cluster)
    for worker in (0, 1):
        workers.give(worker, {"id": "boat"})
    cluster.results["do 0"] = {"state": "cancelled"}
    get = cluster.get

    def last(future: str, timeout: float | None = None) -> Any:
        cluster.failing = RayError("it has left")
        return get(future, timeout)

    cluster.get = last  # type: ignore[method-assign]
    assert facts(workers.stop(60)) == [("ended", 0, {"state": "cancelled"})]


def test_of_a_client_that_is_not_connected_nothing_is_asked(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Crew(Settings(workers=2, address="ray://10.0.0.1:10001"), cluster)
    made.open(0)
    cluster.calls.clear()
    monkeypatch.setattr(client, "is_connected", lambda: False)
    made.close()
    assert made.stop(99) == [] and not cluster.calls


def test_workers_get_their_gpus_their_threads_and_one_of_the_captioners(
    cluster: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.cluster = [cluster.node(A, 7.0), cluster.node(B, 3.0)]
    made = Crew(Settings(gpus_per_job=2, captioners=2), cluster)
    assert [given["scheduling_strategy"].node_id for _, given, _ in cluster.started] == [A, B]
    assert [given["scheduling_strategy"].soft for _, given, _ in cluster.started] == [True, True]
    assert [words for _, _, words in cluster.started] == [(4,), (4,)]  # twelve cores for three workers
    assert [(given["num_gpus"], given["num_cpus"]) for _, given, _ in cluster.started] == [(1, 0)] * 2
    for worker in (0, 1, 3):
        made.open(worker)
    hands = cluster.started[2:]
    assert [words[5].captioner.number for _, _, words in hands] == [0, 1, 1]
    name, given, words = hands[0]
    assert name == "Hand" and given == {"max_restarts": 0, "max_task_retries": 0, "num_gpus": 2, "num_cpus": 1}
    assert words[:5] == (crew.WORKER, 2, 3, os.getcwd(), None)


def test_without_gpus_captioners_are_anywhere_and_threads_are_as_they_are_set(
    cluster: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    made = Crew(Settings(workers=3, captioners=1), cluster)
    ((_, given, words),) = cluster.started
    assert words == (5,) and given["num_gpus"] == 0 and "scheduling_strategy" not in given
    made.open(0)
    assert cluster.started[1][1]["num_gpus"] == 0 and cluster.started[1][2][4] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(crew, "usable_cores", lambda: 1)  # of workers that share a core each has a thread
    Crew(Settings(workers=4, captioners=1), cluster)
    assert cluster.started[2][2] == (1,)
    lone = Crew(Settings(workers=1), cluster)
    lone.open(0)
    assert cluster.started[3][2][5] is None  # there is no captioner to be asked


def test_a_question_reaches_the_captioner_and_its_death_is_an_answer(workers: Crew) -> None:
    class Captioner:
        def __init__(self, failing: bool) -> None:
            self.failing, self.answer = failing, SimpleNamespace(remote=self.ask)

        async def ask(self, asked: Any) -> Any:
            if self.failing:
                raise RayError("it died")
            return {"text": asked["what"]}

    ask: Callable[[bool], Any] = lambda failing: asyncio.run(crew._Line(Captioner(failing))({"what": "boat"}))  # noqa: E731
    assert ask(False) == {"text": "boat"} and ask(True) == {"failed": "RayError (it died)"}


def test_the_end_of_a_crew_ends_workers_then_captioners_then_ray(cluster: Ray) -> None:
    made = Crew(Settings(workers=2, captioners=2), cluster)
    for worker in (0, 1):
        made.open(worker)
    cluster.calls.clear()
    cluster.waits.clear()
    made.close()
    assert cluster.calls == [("end", 2), ("end", 3), *(("kill", number) for number in (2, 3, 0, 1)), "shutdown"]
    assert cluster.waits == [(["end 2", "end 3"], 2, 10.0)]
    made.close()  # once more, with nobody there
    assert cluster.calls[7:] == [("kill", 0), ("kill", 1), "shutdown"] and len(cluster.waits) == 1


def test_a_crew_whose_head_has_gone_ends_its_processes_and_nothing_more(workers: Crew, cluster: Ray) -> None:
    cluster.answers, cluster.now = False, 200.0
    with pytest.raises(Gone):
        workers.wait(1)
    cluster.calls.clear()
    workers.close()
    assert cluster.calls == [("end", 0), ("end", 1)]


@pytest.mark.parametrize("error", [None, RayError("gone"), GetTimeoutError("it hangs"), TimeoutError("it hangs")])
def test_a_worker_that_is_dropped_takes_its_own_orders_along_only(
    error: Exception | None, workers: Crew, cluster: Ray
) -> None:
    cluster.results |= {"end 1": error} if error else {}
    workers.drop(1)
    assert cluster.calls == [("end", 1), ("kill", 1)] and cluster.waits == [("end 1", 10.0)]
    cluster.results |= {"start 0": {"node": "a"}, "start 1": {"node": "b"}}
    assert facts(workers.wait(1)) == [("ready", 0, {"node": "a"})]
