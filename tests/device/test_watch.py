"""Processes that watch over each other: whichever dies, fails or hangs is named, and all end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import Ranks
from wan.device import watch
from wan.device.parallel import Group, Team
from wan.device.peers import MISSED, Ended, Peer
from wan.device.ranks import Sizes, World
from wan.device.watch import LEAVE, SETTLE, Findings, Kind, Sign, Watch, is_collective

SIZE = 3
TIMEOUT = 2.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def _work(rank: int, size: int, folder: str, do: str) -> None:
    """Each process counts up, as it would begin operations; number 2 does something else at 5, in one case 0."""
    where, begun = Path(folder), [0]

    def share(make: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        file = where / "port"
        if rank == 0:
            port, key = make()
            file.with_suffix(".new").write_text(f"{port} {key}")
            for words in (b"", b'{"key": "guessed", "rank": 1, "host": "x"}\n', b"GET / HTTP/1.1\r\n\r\n"):
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
            file.with_suffix(".new").rename(file)
            return port, key
        while not file.exists():
            time.sleep(0.01)
        text, key = file.read_text().split()
        return int(text), key

    one = Watch(rank, size, lambda: begun[0], lambda: None, TIMEOUT)
    one.start(share, "127.0.0.1")
    (where / f"pid_{rank}").write_text(str(os.getpid()))
    at_fault = 0 if do.startswith("first") else 2
    sees = do == "launched dies" and rank == 0
    try:
        while begun[0] < (10 if do == "nothing" else 10**6):
            time.sleep(0.02)
            begun[0] += do != "hangs" or begun[0] < 6  # they wait for number 2 then
            if sees and begun[0] == 8:
                (where / "sees").touch()
                raise RuntimeError("gloo: connection closed by peer")
            if rank == at_fault and begun[0] == 5:
                if do.endswith("dies"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if do.endswith("fails"):
                    raise ValueError("a bug")
                if do.endswith("stops"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                if do == "hangs":
                    time.sleep(100)
        one.close()
        (where / f"output_{rank}").write_text("done")
    except BaseException as error:
        cause = one.end(error)
        (where / f"output_{rank}").write_text(f"{type(cause).__name__}: {cause}")
        raise cause from None


def output_of(folder: Path, rank: int) -> str:
    file = folder / f"output_{rank}"
    return file.read_text() if file.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "line"),
    [
        ("nothing", "done"),
        ("dies", "Ended: process 2 on HOST has died: it was killed, is out of memory, or its machine is gone; what is"),
        ("fails", "Ended: process 2 on HOST has failed: ValueError: a bug; what is finished is kept"),
        ("hangs", "Ended: process 2 on HOST lets the others wait for more than 2 s (collective_timeout)"),
        ("stops", "Ended: process 2 on HOST lets the others wait for more than 2 s"),
        ("first fails", "ValueError: a bug"),
        ("first dies", ""),
    ],
)
def test_all_end_and_the_one_at_fault_is_named(do: str, line: str, ranks: Ranks, tmp_path: Path) -> None:
    begun = time.monotonic()

    def release(pids: list[int]) -> None:
        """What is stopped cannot end itself, which is a launcher's work."""
        while do == "stops" and not output_of(tmp_path, 0):
            time.sleep(0.1)
            assert time.monotonic() - begun < 30
        if do == "stops":
            os.kill(pids[2], signal.SIGKILL)

    codes = ranks.codes(_work, SIZE, str(tmp_path), do, meanwhile=release, seconds=30)
    assert output_of(tmp_path, 0).startswith(line.replace("HOST", os.uname().nodename))
    expected: dict[str, list[Any]] = {
        "nothing": [0, 0, 0],
        "dies": [1, 1, -9],
        "stops": [1, 1, -9],
        "first dies": [-9, 1, 1],
    }
    assert codes == expected.get(do, [1, 1, 1])


def _forms(rank: int, size: int, folder: str, who: int, nth: int, do: str) -> None:
    """Processes divide their work; at the making of a group one of them does not go on."""
    makes, made = Team._group, [0]

    def breaks(*given: Any, **more: Any) -> Any:
        made[0] += 1
        if rank == who and made[0] == nth:
            if do == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        return makes(*given, **more)

    watch.LEAVE = 1.0  # seconds; the first process waits in the making, out of which no signal brings it
    Team._group = breaks  # type: ignore[method-assign]
    with (Path(folder) / f"output_{rank}").open("w") as file:
        sys.stdout = sys.stderr = file
        logging.basicConfig(stream=file, force=True)
        team = Team.start(World(rank, size, rank, "127.0.0.1"), lambda team: Sizes(cfg=2), torch.device("cpu"), TIMEOUT)
        torch.distributed.barrier()  # the first process has the store, by which the other one makes its last group
        team.end()
    sys.exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "nth", "do"),
    [
        (1, 1, "dies"),
        (1, 4, "hangs"),
        *(
            pytest.param(who, nth, do, marks=pytest.mark.rare)
            for who, nth, do in ((1, 2, "dies"), (1, 3, "dies"), (1, 4, "dies"), (0, 1, "dies"), (1, 1, "hangs"))
        ),
        (1, 5, "dies"),
    ],
)
def test_a_process_that_dies_while_groups_are_made_ends_all(
    who: int, nth: int, do: str, ranks: Ranks, tmp_path: Path
) -> None:
    begun = time.monotonic()
    codes = ranks.codes(_forms, 2, str(tmp_path), who, nth, do, seconds=20)
    if nth == 5:  # there are four, so that this test would see it if a group came to be
        assert codes == [0, 0]
        return
    assert codes == {(1, "dies"): [2, -9], (0, "dies"): [-9, 1], (1, "hangs"): [2, 1]}[who, do]
    assert time.monotonic() - begun < 15
    words = "has died" if do == "dies" else "lets the others wait for more than 2 s"
    assert f"process {who} on" in output_of(tmp_path, 1 - who) and words in output_of(tmp_path, 1 - who)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all(number: signal.Signals, ranks: Ranks, tmp_path: Path) -> None:
    def stop(pids: list[int]) -> None:
        while len(list(tmp_path.glob("pid_*"))) < SIZE:
            time.sleep(0.02)
        time.sleep(0.2)
        for pid in pids:  # as a launcher does, or a terminal
            os.kill(pid, number)

    codes = ranks.codes(_work, SIZE, str(tmp_path), "runs", meanwhile=stop, seconds=30)
    assert None not in codes and 0 not in codes
    assert output_of(tmp_path, 0).startswith("KeyboardInterrupt")


@pytest.mark.slow
def test_one_that_died_is_named_also_where_its_launcher_stops_the_others_at_once(ranks: Ranks, tmp_path: Path) -> None:
    def stop(pids: list[int]) -> None:
        while not (tmp_path / "sees").exists():
            time.sleep(0.02)
        time.sleep(SETTLE / 5)  # the first process waits for the cause of what it saw
        for pid in pids[:2]:
            os.kill(pid, signal.SIGTERM)

    codes = ranks.codes(_work, SIZE, str(tmp_path), "launched dies", meanwhile=stop, seconds=30)
    assert output_of(tmp_path, 0).startswith(f"Ended: process 2 on {os.uname().nodename} has died")
    assert codes[0] == 1 and codes[2] == -9 and codes[1]


@pytest.mark.slow
def test_one_process_that_is_stopped_alone_is_named(ranks: Ranks, tmp_path: Path) -> None:
    def stop(pids: list[int]) -> None:
        while len(list(tmp_path.glob("pid_*"))) < SIZE:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(pids[1], signal.SIGTERM)

    codes = ranks.codes(_work, SIZE, str(tmp_path), "runs", meanwhile=stop, seconds=30)
    assert None not in codes and 0 not in codes
    assert output_of(tmp_path, 0).startswith(f"Ended: process 1 on {os.uname().nodename} was stopped by SIGTERM")


def test_what_follows_from_a_death_is_not_its_cause() -> None:
    kinds: list[Kind] = ["signal", "waited", "hung", "died"]
    watcher = Watch(0, 4, lambda: 0, lambda: None, 1.0)
    for rank, kind in enumerate(kinds):
        watcher.findings.note(Sign(kind, rank, "host"))
    watcher._decide()
    assert watcher.fault is not None and watcher.fault.startswith("process 3 on host has died")
    assert is_collective(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_collective(torch.distributed.DistStoreError("Timed out after 3 clients joined"))
    assert not is_collective(RuntimeError("shapes differ")) and not is_collective(Ended("gloo"))


def _peers(*begun: int, heard: float = 0.0) -> list[Peer]:
    return [Peer(socket.socket(), rank, "host", heard, count) for rank, count in enumerate(begun, 1)]


def test_a_machine_that_is_gone_ends_all_within_a_minute() -> None:
    quiet = MISSED["TCP_KEEPIDLE"] + MISSED["TCP_KEEPINTVL"] * MISSED["TCP_KEEPCNT"]
    assert max(quiet, MISSED["TCP_USER_TIMEOUT"] / 1000) + SETTLE + LEAVE < 60


def test_who_has_begun_the_fewest_operations_when_all_stand_still_hangs() -> None:
    findings, peers = Findings(5.0), _peers(8, 6, 8)
    findings.compare(8, peers, 1.0)
    findings.compare(8, peers, 6.0)
    peers[2].heard = 6.5
    assert not findings.is_due(time.monotonic() + 9)  # not longer than allowed
    findings.compare(8, peers[2:], 6.5)  # something went on
    findings.compare(8, peers[2:], 12.0)
    assert not findings.is_due(time.monotonic() + 9)  # all have begun as many: one of them computes
    for peer in peers:
        peer.heard = 20.0
    findings.compare(8, peers, 20.0)
    findings.compare(8, peers, 25.1)
    assert findings.is_due(time.monotonic() + 9) and not findings.is_due(time.monotonic())
    assert findings.cause == Sign("hung", 2, "host", "5")


def test_who_says_nothing_for_too_long_hangs_and_who_fails_says_why() -> None:
    findings, peers = Findings(5.0), _peers(8, 8, heard=10.0)
    findings.hear(peers[1], {"begun": 9})
    assert peers[1].begun == 9 and not peers[1].has_said_why
    peers[1].heard = 15.0
    findings.compare(9, peers, 16.1)
    assert findings.cause == Sign("hung", 1, "host", "5")
    findings.hear(peers[1], {"failed": "ValueError: a bug", "waits": False})
    assert peers[1].has_said_why and findings.cause == Sign("failed", 2, "host", "ValueError: a bug")
    findings.hear(peers[0], {"signal": 15})
    assert findings.cause.kind == "failed"


def test_all_groups_are_aborted_at_once_since_one_may_wait_for_another() -> None:
    freed = threading.Event()
    ends: list[str] = []

    class Waiting:
        def abort(self) -> None:
            ends.append("waits" if freed.wait(20) else "gives up")

    class Frees:
        def abort(self) -> None:
            freed.set()

    team = Team(World(0, 2), Sizes(1, 2))
    team.tokens = Group(Waiting(), 2, 0, by_heads=Group(Frees(), 2, 0))
    team.all_ = Group(Waiting(), 2, 0)
    team._abort()
    until = time.monotonic() + 10
    while len(ends) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert ends == ["waits", "waits"]
