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

from tests.batch.test_run import MADE, Crew, Event, make, tasks_of
from tests.support.served import SHAPES
from wan import cli
from wan.batch.hand import UPLOAD, Hand
from wan.batch.schedule import Schedule
from wan.batch.upload import LIST, UploadError, check_place, is_uploaded, upload
from wan.errors import UserError
from wan.files import file_digest
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
    assert not is_uploaded(folder, URL) and not is_uploaded(folder / "takes/none", URL)
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
    assert not is_uploaded(folder, URL)
    upload(folder, URL)
    assert Flaky.puts[4:] == ["joined.mp4"] and is_uploaded(folder, URL)


class NoSuchBucket(Exception):
    """As botocore's."""


class Buckets(Flaky):
    """A store that would make a bucket, as s3fs does, for a folder in one that is not there."""

    protocol = ("s3", "s3a")  # type: ignore[assignment]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError(f"{path} would be made")

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        raise FileNotFoundError("The specified bucket does not exist") from NoSuchBucket()

    pipe_file = cat_file


def test_a_bucket_that_is_not_there_is_said_and_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Buckets(), "nowhere/a b"))
    for do in (is_uploaded, upload):
        with pytest.raises(UploadError, match="The specified bucket does not exist"):
            do(folder, "s3://nowhere/a b")


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


def test_a_store_out_of_reach_is_one_line_however_many_rows_there_are() -> None:
    crew = Crew(lambda name, count: pytest.fail("nothing is begun"), 2)
    error = {"error": {"code": UPLOAD, "message": "the upload to s3://x cannot be looked at (down)"}}
    crew.give = lambda worker, order: crew.events.append(  # type: ignore[method-assign]
        Event("ended", worker, {"state": FAILED, "done": 0, "count": 0, "made": 0, **error})
    )
    with pytest.raises(UserError, match=r"^the upload to s3://x cannot be looked at \(down\); nothing was begun$"):
        make(crew, tasks_of(*"abcdefgh"), max_failures=1, skip_bad=True)


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


def test_a_store_says_no_more_than_it_holds(folder: Path) -> None:
    upload(folder, URL)
    listed = json.loads(Flaky().cat_file(f"/store/runs/a b/{LIST}"))
    assert listed["complete"] is True and set(listed["files"]) == {"joined.mp4", "run.json", "takes/one.mp4"}
    assert listed["files"]["run.json"] == {"bytes": 19, "digest": file_digest(folder / "run.json")}
    assert set(Flaky.store) == {f"/store/runs/a b/{name}" for name in (*listed["files"], LIST)}
    for name in ("more.txt", "takes/two.mp4"):
        (folder / name).touch()
        assert not is_uploaded(folder, URL)  # a file more here
        (folder / name).unlink()
    assert is_uploaded(folder, URL)
    (folder / "run.json").unlink()
    assert not is_uploaded(folder, URL)  # and one less
    upload(folder, URL)
    assert is_uploaded(folder, URL) and len(Flaky.puts) == 3
    (folder / "joined.mp4").write_text("WHAT IS IN JOINED.MP4", encoding="utf-8")  # as long, and another
    upload(folder, URL)
    assert Flaky.puts[3:] == ["joined.mp4"]


def test_each_file_that_is_there_is_heard_of(folder: Path) -> None:
    heard = list[int]()
    upload(folder, URL, lambda: heard.append(len(Flaky.puts)))
    upload(folder, URL, lambda: heard.append(len(Flaky.puts)))
    assert heard == [1, 2, 3]


def test_an_upload_in_the_middle_says_so(folder: Path) -> None:
    lists = list[Any]()
    upload(folder, URL, lambda: lists.append(json.loads(Flaky().cat_file(f"/store/runs/a b/{LIST}"))))
    assert [(one["complete"], len(one["files"])) for one in lists] == [(False, 1), (False, 2), (False, 3)]
    (folder / "run.json").write_text("another", encoding="utf-8")
    upload(folder, URL, lambda: lists.append(json.loads(Flaky().cat_file(f"/store/runs/a b/{LIST}"))))
    assert [(one["complete"], len(one["files"])) for one in lists[3:]] == [(False, 3)]


def test_a_chain_goes_to_a_folder_of_any_other_file_system(folder: Path, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/store/a", f"file://{tmp_path}/store/b/"):
        assert not is_uploaded(folder, url)
        upload(folder, url)
        assert is_uploaded(folder, url)
    names = {path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*.*")}
    assert names == {f"{at}/{name}" for at in "ab" for name in ("joined.mp4", "run.json", "takes/one.mp4", LIST)}


def test_why_a_store_cannot_be_used_is_one_short_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [RuntimeError("it is\n far   away"), RuntimeError(""), RuntimeError("x" * 300)]
    lines = ["RuntimeError: it is far away", "RuntimeError", f"RuntimeError: {'x' * 200}"]
    url = "flaky://me:secret@store/a"
    for error, line in zip(errors, lines, strict=True):

        def fail(_: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr("fsspec.core.url_to_fs", fail)
        for do, words in (
            (lambda: check_place(url), f"upload flaky://store/a cannot be used ({line})"),
            (lambda: is_uploaded(folder, url), f"the upload to flaky://store/a cannot be looked at ({line})"),
            (lambda: upload(folder, url), f"its upload to flaky://store/a failed ({line})"),
        ):
            with pytest.raises((UserError, UploadError)) as failed:
                do()
            assert str(failed.value) == words


def test_a_store_of_buckets_gets_no_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Buckets):
        cat_file, pipe_file = Flaky.cat_file, Flaky.pipe_file

        def put_file(self, local: str, remote: str, **_: Any) -> None:
            self.pipe_file(remote, Path(local).read_bytes())

    for protocol in (("s3", "s3a"), "gs"):
        monkeypatch.setattr(Full, "protocol", protocol)
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Full(), f"/{url}"))
        upload(folder, str(protocol[0]))  # where `makedirs` fails
        assert is_uploaded(folder, str(protocol[0]))
