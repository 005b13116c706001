"""A cluster that goes while a batch waits for it, with a Ray that is made up."""

from __future__ import annotations

import math
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError
from ray.util.client import ray as client

from wan.batch import crew
from wan.batch.crew import Gone
from wan.batch.hand import WRITING


class Cluster:
    """A head that answers or not, this machine in the cluster or not, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.answers, self.alive, self.asked = 100.0, True, True, list[tuple[str, float]]()
        nodes = [{"NodeID": "other", "Alive": True}, {"NodeID": "here", "Alive": True}]
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(crew, "_reach", self.reach)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
        monkeypatch.setattr(ray, "nodes", lambda: [nodes[0], nodes[1] | {"Alive": self.alive}])

    def reach(self, address: str, seconds: float) -> None:
        self.asked.append((address, seconds))
        if not self.answers:
            raise ConnectionRefusedError("nobody listens")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_the_head_is_looked_at_now_and_then(cluster: Cluster) -> None:
    head = crew._Head("10.0.0.1:6379")
    cluster.now = 102.9
    head.look()
    assert not cluster.asked
    for cluster.now in (103.0, 104.0, 106.0):
        head.look()
    assert cluster.asked == [("10.0.0.1:6379", 3.0)] * 2 and not head.gone


def test_a_head_that_answers_again_has_not_gone(cluster: Cluster) -> None:
    head = crew._Head("10.0.0.1:6379")
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
    assert head.gone and len(cluster.asked) == 4


def test_a_machine_that_is_no_longer_in_the_cluster_has_gone(cluster: Cluster) -> None:
    head = crew._Head("10.0.0.1:6379")
    cluster.alive, cluster.now = False, 103.0
    with pytest.raises(Gone, match="this machine is no longer part of the Ray cluster"):
        head.look()
    assert head.gone


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://127.0.0.1:{}/space"])
def test_where_nobody_listens_is_known_before_ray_is_asked(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        crew._reach(address.format(port), 1)
    with pytest.raises(OSError):
        crew._reach(address.format(port), 1)
    crew._reach("auto", 1)  # names no machine


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
        ("ActorUnavailableError", "first\nlast\n\n", "its machine cannot be reached (last)"),
        ("NodeDiedError", "", "its machine has gone ()"),
        ("Strange", "x" * 400, f"Strange ({'x' * 300})"),
    ],
)
def test_why_a_worker_is_lost_is_one_line(name: str, text: str, line: str) -> None:
    assert crew._reason(type(name, (Exception,), {})(text)) == line


class Actor:
    """Stands for a Hand: each call is kept and gives a future, which is its name."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        def remote(*words: Any) -> str:
            self.calls.append((name, *words))
            return f"{name} {len(self.calls)}"

        return SimpleNamespace(remote=remote)


@pytest.fixture
def workers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A crew with workers 0 and 1, what its actors were asked, and the results that Ray has of them."""
    made = object.__new__(crew.Crew)
    calls, results = list[Any](), dict[str, Any]()
    made._head = SimpleNamespace(look=lambda: None, gone=False)  # type: ignore[assignment]
    made._members = {number: crew._Member(Actor(calls), began=cluster.now) for number in range(2)}
    made._futures = {"start 0": ("ready", 0), "start 1": ("ready", 1)}
    made._captioners, made._by_client = [], False

    def get(future: str, timeout: float | None = None) -> Any:
        result = results.pop(future, None)
        if isinstance(result, Exception):
            raise result
        return result

    def wait(futures: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return [future for future in futures if future in results][:num_returns], []

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "kill", lambda actor: calls.append("kill"))
    return made, calls, results


def test_an_order_that_ended_with_writing_is_asked_about_again(workers: Any) -> None:
    made, calls, results = workers
    made._members[0].looked = math.inf  # nobody looks at it
    results |= {"start 0": {"node": "a"}, "start 1": {"error": "no GPU"}}
    events = made.wait(1)
    assert [(event.kind, event.worker, dict(event.message)) for event in events] == [
        ("ready", 0, {"node": "a"}),
        ("lost", 1, {"reason": "no GPU"}),
    ]
    assert calls == [("end",), "kill"] and list(made._members) == [0]
    made.give(0, {"id": "boat"})
    assert calls[2] == ("do", {"id": "boat"})
    results["do 3"] = {"state": WRITING}
    assert [event.kind for event in made.wait(1)] == ["ended"] and calls[3:] == [("written",)]
    assert set(made._futures.values()) == {("written", 0)}
    # the next order ends while the one before is still being written: that is said first
    made.give(0, {"id": "car"})
    results["do 5"] = {"state": WRITING}
    assert made.wait(1) == []
    results |= {"written 4": {"state": "completed"}, "do 5": {"state": WRITING}}
    assert [event.kind for event in made.wait(1)] == ["written", "ended"]


def test_a_worker_at_work_is_looked_at_once_a_second(workers: Any, cluster: Cluster) -> None:
    made, calls, results = workers
    made._futures = {"do": ("ended", 0)}
    made.wait(1)
    assert calls == [("look",)]  # worker 1 does nothing
    cluster.now += 5
    made.wait(1)
    assert calls == [("look",)]  # its answer is not here yet
    results["look 1"] = {"id": "boat"}
    (event,) = made.wait(1)
    assert (event.kind, event.worker, event.message) == ("seen", 0, {"id": "boat"})
    made.wait(1)
    assert calls == [("look",)] * 2


def test_a_worker_that_waits_long_for_its_place_is_worth_one_line(
    workers: Any, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    made, _, _ = workers
    made._futures = {"start 1": ("ready", 1)}
    for cluster.now in (160.0, 160.1, 300.0):
        made.wait(0)
        assert len(caplog.records) == (cluster.now > 160)
    assert "worker 1 waits for a place in the cluster" in caplog.text


def test_a_worker_that_dies_takes_all_that_was_asked_of_it_along_and_nobody_else(workers: Any) -> None:
    made, _, results = workers
    made._members[0].looked = math.inf
    made._futures = {"do 0": ("ended", 0), "written 0": ("written", 0), "do 1": ("ended", 1)}
    made._members[1].looked = math.inf
    results |= {"do 0": RayError("it died"), "written 0": {"state": "completed"}, "do 1": {"state": "completed"}}
    lost, ended = made.wait(1)
    assert (lost.kind, lost.worker, lost.message) == ("lost", 0, {"reason": "RayError (it died)"})
    assert (ended.kind, ended.worker) == ("ended", 1)
    assert list(made._members) == [1] and not made._futures


def test_workers_that_stop_are_heard_for_a_while(
    workers: Any, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    made, calls, results = workers
    made._futures = {"do 0": ("ended", 0), "do 1": ("ended", 1)}
    for member in made._members.values():
        member.looked = math.inf
    results["do 0"] = {"state": "cancelled"}
    waits = list[float]()
    wait = made.wait

    def waiting(seconds: float) -> Any:
        waits.append(seconds)
        cluster.now += 1
        return wait(seconds)

    made.wait = waiting
    assert [(event.kind, event.worker) for event in made.stop(3)] == [("ended", 0)]
    assert calls == [("stop",)] * 2 and len(waits) == 3  # worker 1 never ends
    results["do 1"] = {"state": "cancelled"}
    assert [event.worker for event in made.stop(99)] == [1] and len(waits) == 4 and made.stop(99) == []

    def gone(seconds: float) -> Any:
        waits.append(seconds)
        raise Gone("it has gone")

    made.wait, made._futures = gone, {"do 0": ("ended", 0)}
    assert made.stop(99) == [] and len(waits) == 5
    made._by_client = True
    monkeypatch.setattr(client, "is_connected", lambda: False)
    del calls[:]
    assert made.stop(99) == [] and not calls  # nobody can be asked


def test_workers_get_their_gpus_their_threads_and_one_of_the_captioners(
    workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls, _ = workers
    asked = list[Any]()

    def remote(kind: type) -> Any:
        def options(**given: Any) -> Any:
            def start(*words: Any) -> Actor:
                asked.append((kind.__name__, given, words))
                return Actor(calls)

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    made.gpus_per_job, made.places, made.threads = 2, SimpleNamespace(uses_gpus=True, siblings=3), None
    made._captioners = ["a", "b"]
    for worker in (0, 1, 3):
        made.open(worker)
    assert [words[5].captioner for _, _, words in asked] == ["a", "b", "b"]
    name, given, words = asked[0]
    assert name == "Hand" and given == {"max_restarts": 0, "max_task_retries": 0, "num_gpus": 2, "num_cpus": 1}
    assert words[1:3] == (2, 3) and set(made._futures.values()) >= {("ready", 0), ("ready", 3)}
    made._captioners, made.places.uses_gpus = [], False
    made.open(0)
    assert asked[-1][1]["num_gpus"] == 0 and asked[-1][2][5] is None
    del asked[:]
    made._captioner("")
    made.threads, made.places.uses_gpus = "5", True
    made._captioner("ab" * 28)
    assert [words for _, _, words in asked] == [(4,), (5,)]  # twelve cores for three
    assert [(given["num_gpus"], given["num_cpus"]) for _, given, _ in asked] == [(0, 0), (1, 0)]
    assert "scheduling_strategy" not in asked[0][1] and asked[1][1]["scheduling_strategy"].soft


@pytest.mark.parametrize(("gone", "kills"), [(False, 3), (True, 0)])
def test_a_crew_that_closes_ends_its_processes_and_ray_where_that_is_there(
    gone: bool, kills: int, workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls, _ = workers
    shut = list[bool]()
    monkeypatch.setattr(ray, "shutdown", lambda: shut.append(True))
    made._captioners, made._head.gone = ["a"], gone
    made.close()
    assert calls == [("end",)] * 2 + ["kill"] * kills and shut == [True] * (not gone)
    assert bool(made._members) is gone


def test_a_worker_that_is_dropped_takes_its_own_orders_along_only(workers: Any) -> None:
    made, _, _ = workers
    made.drop(1)
    assert made._futures == {"start 0": ("ready", 0)} and list(made._members) == [0]


def test_the_end_of_a_crew_ends_workers_then_captioners_then_ray(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls, _ = workers
    hands = [member.hand for member in made._members.values()]
    made._captioners = ["captioner a", "captioner b"]
    killed = list[Any]()
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "shutdown", lambda: killed.append("ray"))
    made.close()
    assert calls == [("end",), ("end",)] and killed == [*hands, "captioner a", "captioner b", "ray"]
    assert not made._members and not made._futures


def test_a_crew_whose_head_has_gone_ends_nothing_more(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls, _ = workers
    made._head.gone = True
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("ray"))
    made.close()
    assert calls == [("end",), ("end",)]
    made._by_client = True  # and a client that is not connected asks for nothing at all
    made.close()
    assert calls == [("end",), ("end",)] and made.stop(1) == []


def test_a_crew_that_stops_waits_no_longer_for_a_cluster_that_has_gone(workers: Any) -> None:
    made, calls, _ = workers
    made._futures = {"do": ("ended", 0)}
    answers: list[Any] = [["an event"], Gone("the head has gone")]

    def wait(seconds: float) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Gone):
            raise answer
        return answer

    made.wait = wait
    assert made.stop(60) == ["an event"] and calls == [("stop",), ("stop",)] and not answers
