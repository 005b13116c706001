"""Finished chains go to a store: what is there, what is missing, and what a failure costs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.batch.test_run import MADE, Crew, make, tasks_of
from tests.support.served import SHAPES
from wan import cli
from wan.batch.hand import UPLOAD, Hand
from wan.batch.schedule import Schedule
from wan.batch.upload import LIST, UploadError, check_place, is_uploaded, upload
from wan.kinds import Place
from wan.server.tickets import DONE, FAILED
from wan.server.wire import CHECKED


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store of this process whose writing number `fails_at` fails, or with `cuts` writes half."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    puts: list[str] = []
    fails_at, cuts = 0, False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky:/")))

    def put_file(self, local: str, remote: str, **more: Any) -> None:
        self.puts.append(remote.rpartition("/")[2])
        if len(self.puts) == self.fails_at:
            if not self.cuts:
                raise PermissionError("the token has expired")
            self.pipe_file(remote, Path(local).read_bytes()[:1])
            return
        super().put_file(local, remote, **more)


fsspec.register_implementation("flaky", Flaky, clobber=True)
URL = "flaky://store/runs/a b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Flaky.store.clear()
    Flaky.puts.clear()
    Flaky.fails_at, Flaky.cuts = 0, False
    for name in ("joined.mp4", "run.json", "takes/one.mp4", ".lock", ".run.json.12.part"):
        path = tmp_path / "a b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what is in {name}", encoding="utf-8")
    return tmp_path / "a b"


def test_all_but_hidden_files_go_up_and_nothing_twice(folder: Path) -> None:
    assert not is_uploaded(folder, URL)
    upload(folder, URL)
    assert is_uploaded(folder, URL) and Flaky.puts == ["joined.mp4", "run.json", "one.mp4"]
    assert {name for name in Flaky.store if "/." in name} == set() and len(Flaky.store) == 4
    upload(folder, URL)
    assert len(Flaky.puts) == 3
    (folder / "joined.mp4").write_text("another end")  # a clip was made again
    assert not is_uploaded(folder, URL)
    upload(folder, URL)
    assert Flaky.puts[3:] == ["joined.mp4"] and is_uploaded(folder, URL)


@pytest.mark.parametrize(("cuts", "why"), [(False, "PermissionError: the token has expired"), (True, "has 1 of")])
def test_an_upload_that_fails_is_none_and_goes_on_where_it_was(cuts: bool, why: str, folder: Path) -> None:
    Flaky.fails_at, Flaky.cuts = 2, cuts
    with pytest.raises(UploadError, match=why):
        upload(folder, URL)
    assert not is_uploaded(folder, URL)
    listed = json.loads(Flaky().cat_file(f"/store/runs/a b/{LIST}"))
    assert not listed["complete"] and list(listed["files"]) == ["joined.mp4"]
    upload(folder, URL)
    assert Flaky.puts == ["joined.mp4", "run.json", "run.json", "one.mp4"] and is_uploaded(folder, URL)
    Flaky().rm_file("/store/runs/a b/joined.mp4")  # by somebody else
    upload(folder, URL)
    assert Flaky.puts[4:] == ["joined.mp4"]


MAKER = """
import json, sys
def say(event, **more): print(json.dumps({"event": event, "id": name, **more}), flush=True)
name = ""
sys.stdin.readline()
say("ready")
for line in sys.stdin:
    order = json.loads(line)
    name = order["id"]
    found = {"clips": 1, "missing": 0, "status": "finished"}
    say("end", state="checked", found=found) if order.get("check") else say("end", state="completed")
"""


def test_a_hand_uploads_what_it_finished_and_tells_a_check_what_is_there(folder: Path) -> None:
    async def work() -> list[dict[str, Any]]:
        one = Hand((sys.executable, "-c", MAKER), 1, 1, os.getcwd(), None)
        await one.start()
        order = {"id": "a", "settings": {"output_dir": str(folder)}, "upload": URL}
        Flaky.fails_at = 1
        ended = [await one.do(order | {"check": check}) for check in (True, False, False, True)]
        await one.end()
        return ended

    before, failed, made, after = asyncio.run(work())
    assert (before["state"], before["found"]["uploaded"], after["found"]["uploaded"]) == (CHECKED, False, True)
    assert failed["state"] == FAILED and failed["error"]["code"] == UPLOAD and made["state"] == "completed"
    assert failed["error"]["message"] == f"its upload to {URL} failed (PermissionError: the token has expired)"


@pytest.mark.slow
@pytest.mark.rare
def test_a_chain_whose_upload_failed_is_tried_again_by_its_worker_and_given_up_with_the_reason() -> None:
    error = {"error": {"code": UPLOAD, "message": "its upload failed"}}
    crew = Crew(lambda name, count: {"state": FAILED, **MADE, **error} if count < 3 else {"state": DONE, **MADE}, 1)
    tasks = tasks_of("a")
    make(crew, tasks, max_failures=9)
    assert tasks[0].state == DONE and crew.dropped == [] and crew.opened[0] == 1
    tasks = tasks_of("b")
    make(Crew(lambda name, count: {"state": FAILED, **MADE, **error}), tasks)
    assert (tasks[0].state, tasks[0].reason, tasks[0].done) == (FAILED, "its upload failed", 2)


@pytest.mark.parametrize("uploaded", [True, False])
def test_what_is_finished_and_not_uploaded_is_given_to_a_worker(uploaded: bool) -> None:
    schedule = Schedule(tasks := tasks_of("a"), 3)
    schedule.begin(tasks[0], 0)
    facts = {"clips": 2, "missing": 0, "work": 0.0, "seconds": 0.0, "measured": True, "disk_bytes": 0.0}
    schedule.end(tasks[0], {"state": CHECKED, "found": facts | {"status": "finished", "uploaded": uploaded}})
    assert tasks[0].state == (DONE if uploaded else CHECKED)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("runs/{name}", "must begin with a scheme"),
        ("file:///runs", "must hold {name}"),
        ("nothing://me:secret@host/{name}", "cannot be used (ValueError: Protocol not known: nothing)"),
    ],
)
def test_a_place_that_is_none_is_said_before_anything_begins(
    url: str, why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--videos", str(SHAPES), "--ckpt_dir", "m", "--output_dir", str(tmp_path / "{name}"), "--upload", url]
    assert cli.batch_main(words) == 2
    stderr = capsys.readouterr().err
    assert why in stderr and stderr.startswith("error: --upload") and stderr.count("\n") == 1 and "secret" not in stderr


def test_a_store_is_shown_without_its_password() -> None:
    assert Place("URL").public("sftp://me:p@ss@host/runs/{name}?token=x") == "sftp://host/runs/{name}"
    check_place("file:///runs/name")
