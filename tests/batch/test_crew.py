"""A cluster that goes while a batch waits for it, with a Ray that is made up."""

from __future__ import annotations

import math
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

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
