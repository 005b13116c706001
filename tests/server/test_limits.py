"""What a server does not do, or not for ever: quotas, files that were made to hurt, workers that die, full disks."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import json
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import wan.server
from tests.support.golden import ROOT
from tests.support.served import serving
from wan import cli
from wan.chain import finished_clip, run_folder
from wan.configs import v2v_5B, v2v_14B
from wan.errors import UserError
from wan.options import OPTIONS, Settings, options_of
from wan.server import chain_routes, folders, supervisor, worker
from wan.server.chains import SHOWN, Chains
from wan.server.decode import decode
from wan.server.errors import ApiError
from wan.server.folders import ChainFolder
from wan.server.intake import Intake
from wan.server.jobs import MOST_PICTURES, Jobs
from wan.server.live import Live
from wan.server.main import serve
from wan.server.metrics import Metrics
from wan.server.planning import plan_of
from wan.server.questions import Questions
from wan.server.supervisor import Supervisor
from wan.server.tickets import FAILED, MAKING, QUEUED, Queue, Ticket, new_id
from wan.server.videos import progress
from wan.server.wire import as_json, owner_settings, settings_of_chain
from wan.vae.preview import CHANNELS


def chains_of(folder: Path, experts: int = 1, **settings: Any) -> Chains:
    folder.mkdir(exist_ok=True)
    owner = Settings(ckpt_dir="x", output_dir=str(folder), **settings)
    return Chains(folder, owner, v2v_14B if experts == 2 else v2v_5B, experts, Queue(folder / "queue.sqlite3"))


def test_names_of_files_are_those_of_the_run_folder() -> None:
    for name in ("JOINED", "RUN", "DATA", "PAGE", "STOP", "PREVIEW"):
        assert getattr(folders, name) == getattr(run_folder, name)
    assert folders.SHEET == finished_clip.SHEET


def test_a_preview_is_asked_for_where_there_can_be_one() -> None:
    assert set(SHOWN) == set(CHANNELS)


def test_a_server_takes_the_flags_of_a_chain_that_are_not_of_one_alone() -> None:
    names = {one.name for one in options_of("serve")}
    assert {
        "host",
        "port",
        "api_key_file",
        "max_upload",
        "max_queue",
        "max_frames",
        "vram",
        "lora",
        "sample_steps",
    } <= names
    assert not {"video", "prompt", "redo", "storyboard", "image", "save_file", "dry_run"} & names
    assert not any(
        OPTIONS[name].client for name in ("host", "port", "api_key_file", "max_upload", "max_queue", "max_frames")
    )


def test_the_process_that_answers_imports_no_model_library() -> None:
    code = "import sys, wan.server.main; print(sorted({'torch', 'transformers', 'diffusers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_quotas_and_what_the_model_cannot(tmp_path: Path) -> None:
    chains = chains_of(tmp_path, max_queue=1, max_frames=500)

    async def ask(**given: Any) -> Ticket:
        return await chains.intake.create({"prompt": "x", **given.pop("settings", {})}, **given)

    with pytest.raises(ApiError, match="567 frames are more than the 500") as caught:
        asyncio.run(ask(settings={"num_videos": 7}))
    assert caught.value.param == "seconds" and not list((tmp_path / "jobs").iterdir())
    with pytest.raises(ApiError, match="810 frames"):
        asyncio.run(ask(clips=[{"takes": 10}]))
    ticket = asyncio.run(ask(seconds=10))  # 81 frames at 24 per second, and then 80 a clip
    assert (ticket.state, ticket.count, round(ticket.seconds, 3)) == (QUEUED, 3, round(241 / 24, 3))
    assert ticket.settings["base_seed"] >= 0  # so that it is the same after a restart
    with pytest.raises(ApiError) as full:
        asyncio.run(ask())
    assert (full.value.status, full.value.headers) == (429, {"Retry-After": "60"})
    a14b = chains_of(tmp_path / "jobs", experts=2)
    with pytest.raises(ApiError, match="makes no video from text alone"):
        asyncio.run(a14b.intake.create({"prompt": "x"}))
    with pytest.raises(ApiError, match="this server has no model"):
        a14b.offer.check_model("wan2.2-ti2v-5b")
    for name in ("wan2.2-i2v-a14b", "v2v-14B", None):
        a14b.offer.check_model(name)


def test_what_is_left_out_of_clips_is_no_part_of_their_length(tmp_path: Path) -> None:
    offer = chains_of(tmp_path).offer
    assert offer.seconds_of({"discard": 8}, 3, still=True) == (81 - 8 + 2 * (80 - 8)) / 24
    assert (offer.clips_of({}, 10.0, still=True), offer.clips_of({"discard": 24}, 10.0, still=True)) == (3, 5)


@pytest.mark.parametrize(
    ("frames", "clips", "from_a_picture"),
    [(1, 1, 1), (80, 1, 1), (81, 2, 1), (82, 2, 2), (160, 2, 2), (161, 3, 2), (162, 3, 3)],
)
def test_clips_are_the_fewest_that_are_so_long(frames: int, clips: int, from_a_picture: int, tmp_path: Path) -> None:
    offer, seconds = chains_of(tmp_path).offer, frames / 24
    assert offer.clips_of({}, seconds, still=False) == clips
    assert offer.clips_of({}, seconds, still=True) == from_a_picture
    assert offer.seconds_of({}, clips, still=False) >= seconds - 1e-9
    assert offer.seconds_of({}, from_a_picture, still=True) == (81 + 80 * (from_a_picture - 1)) / 24


def test_progress_goes_on_through_stages_that_come_between_and_after_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, live, shares = [100.0], Live(), list[float]()
    monkeypatch.setattr("wan.server.live.time.monotonic", lambda: now[0])
    live.hear("clip_started", {"clip": 1})
    for stage, steps in (("load", [0]), ("sample", [1, 2, 5]), ("load", [5]), ("sample", [6, 7]), ("keep", [10])):
        live.hear("stage", {"stage": stage, "step": live.step})
        for step in steps:
            now[0] += 2.0
            live.hear("step", {"step": step, "steps": 10})
            shares.append(live.share)
            if (stage, step) == ("sample", 7):  # two steps in four seconds, since the second model was loaded
                assert live.seconds_left == 6.0
    assert shares == sorted(shares) and shares[-1] == 1.0 and live.seconds_left is None
    live.hear("clip_started", {"clip": 2})
    assert live.share == 0.0 and live.seconds_left is None


def test_folders_without_a_row_go_and_rows_without_a_folder_too(tmp_path: Path) -> None:
    chains = chains_of(tmp_path)
    kept = asyncio.run(chains.intake.create({"prompt": "x"}))
    orphan, half = chains.jobs / new_id(), chains.jobs / f".new-{new_id()}"
    orphan.mkdir()
    half.mkdir()
    (chains.jobs / "mine").mkdir()
    lost = chains.queue.add(Ticket(new_id()))
    chains.tidy()
    assert {path.name for path in chains.jobs.iterdir()} == {kept.id, "mine"}
    assert [ticket.id for ticket in chains.queue.all()] == [kept.id] and lost.id != kept.id


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes that says that it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.slow
def test_a_file_that_was_made_to_hurt_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="neither a video nor a picture") as caught:
        asyncio.run(decode("inspect", bomb(tmp_path / "a", 60_000), tmp_path / "b.png"))
    assert str(tmp_path) not in str(caught.value) and not (tmp_path / "b.png").exists()


def test_a_full_disk_fails_a_chain_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[dict[str, Any]] = []

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.setattr(worker, "make", full)
    send = lambda event, **more: messages.append({"event": event, **more})  # noqa: E731
    good = worker._work(worker.KeptPipeline(), Settings(), send, threading.Event(), worker.Behind())
    assert good and messages[0]["state"] == "failed"
    assert messages[0]["error"] == {
        "code": "disk_full",
        "message": "No space left on device; free space on the disk of the server",
    }


DIES = """import json, sys
sys.stdin.readline()
print(json.dumps({"event": "ready"}), flush=True)
sys.stdin.readline()
sys.exit(9)"""


def test_a_chain_that_takes_down_its_workers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SHORTEST_WAIT", 0.01)
    queue = Queue(tmp_path / "queue.sqlite3")
    ticket = queue.add(Ticket(new_id()))
    over = Supervisor(queue, tmp_path, {}, lambda ticket: {}, Metrics(), (sys.executable, "-c", DIES))

    async def run() -> None:
        over.wake()
        task = asyncio.create_task(over.run())
        while queue[ticket.id].state != FAILED:
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))
    error = queue[ticket.id].error
    assert error is not None and error["message"].startswith("the process that makes videos ended 3 times")


def test_no_name_in_a_report_leads_out_of_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.mp4").touch()
    (run / "report.json").write_text(
        '{"clips": [{"number": 1, "file": "../secret.mp4"}, {"number": 2, "file": "run.json"}]}'
    )
    folder = ChainFolder(tmp_path)
    assert folder.video(1) is None and folder.video(2) is None and folder.takes(1) == {}


def test_a_server_works_on_one_machine_and_its_first_process_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (environment | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="a server works on the GPUs of one machine; start torchrun there alone"):
        serve(Settings(ckpt_dir="x", output_dir=str(tmp_path / "out")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    serve(Settings(ckpt_dir="x", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wan, "server", wan.server)  # it is imported anew, and later tests want it as it was
    for name in [name for name in sys.modules if name == "fastapi" or name.startswith("wan.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.serve_main(["--ckpt_dir", "x"]) == 2
    assert capsys.readouterr().err == 'error: wan-serve needs fastapi: in your clone, pip install -e ".[serve]"\n'


KEY = "a-key-of-some-length"


@pytest.mark.slow
@pytest.mark.rare
def test_a_browser_enters_with_the_key_which_is_in_no_process_list(tmp_path: Path) -> None:
    with serving(tmp_path / "out", "--host", "0.0.0.0", key=KEY, program=("benchmarks.sleeping",)) as served:
        served.url = served.url.replace("0.0.0.0", "127.0.0.1")
        assert served.ask("/v1/videos")[0] == 401 and served.ask("/health")[0] == 200
        assert "The key of this server" in served.ask("/")[1]  # where it leads
        form = {"Content-Type": "application/json"}
        assert served.fetch("/login", "POST", b'{"key": "wrong"}', form)[0] == 401

        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_: Any) -> None:
                return None

        request = urllib.request.Request(f"{served.url}/login", b'{"key": "%s"}' % KEY.encode(), form)
        with pytest.raises(urllib.error.HTTPError) as entered:
            urllib.request.build_opener(Stay).open(request)
        cookie = entered.value.headers["Set-Cookie"]
        assert entered.value.code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
        session = {"Cookie": cookie.partition(";")[0]}
        status, page = served.fetch("/", headers=session)[:2]
        assert status == 200 and b"Continue a video" in page
        assert served.ask("/v1/chains", "POST", {"prompt": "x"}, session)[1]["error"]["code"] == "wrong_token"
        server = psutil.Process(served.process.pid)
        for process in [server, *server.children(recursive=True)]:
            assert KEY not in str(process.cmdline())
            assert process.pid == server.pid or KEY not in str(process.environ())
        kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
        assert kept == []


def test_previews_are_looked_for_until_there_is_one_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, told, looks = tmp_path / "preview.webp", [], 0

    async def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        host.making = None if looks == 1 else "a"
        if looks == 3:  # the clip had no picture until now
            file.write_bytes(b"1")
        if looks == 6:
            raise TimeoutError

    host = SimpleNamespace(making=None, audience=SimpleNamespace(tell=lambda *words, **more: told.append(words)))
    chains: Any = SimpleNamespace(supervisor=host, folder=lambda name: SimpleNamespace(preview=file))
    monkeypatch.setattr(chain_routes, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(TimeoutError):
        asyncio.run(chain_routes.watch_previews(chains))
    assert told == [("a", "preview")]


def test_progress_is_that_of_the_clips_that_a_chain_adds_to_another() -> None:
    chains: Any = SimpleNamespace(supervisor=None)
    assert progress(chains, Ticket("a", state=MAKING, base=2, done=3, count=6)) == 25
    assert progress(chains, Ticket("a", state=MAKING, base=2, done=2, count=6)) == 0
    assert progress(chains, Ticket("a", state=MAKING, done=6, count=6)) == 99  # until it is joined


def test_a_chain_that_the_queue_does_not_take_leaves_no_folder() -> None:
    removed: list[str] = []

    def full(ticket: Ticket) -> Ticket:
        raise OSError(errno.ENOSPC, "No space left on device")

    jobs: Any = SimpleNamespace(keep=lambda folder, name: None, remove=removed.append)
    queue: Any = SimpleNamespace(add=full)
    with pytest.raises(OSError, match="No space"):
        Intake(jobs, None, queue, 1, lambda: None)._add(Ticket("a"), ChainFolder(Path("a")))  # type: ignore[arg-type]
    assert removed == ["a"]


@pytest.mark.parametrize(
    ("code", "printed", "status", "message"),
    [(2, "warned\nas well\nit is wrong\n", 400, "it is wrong"), (2, "wrong\n", 400, "wrong"), (1, "x\n", 500, "log")],
)
def test_a_plan_that_cannot_be_made_says_why_in_its_last_line(
    code: int, printed: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        returncode = code

        async def communicate(self, _: bytes) -> tuple[bytes, None]:
            return printed.encode(), None

    async def begin(*_: str, **__: int) -> Process:
        return Process()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", begin)
    with pytest.raises(ApiError, match=message) as caught:
        asyncio.run(plan_of(Settings(), {}))
    assert caught.value.status == status and "warned" not in str(caught.value)


def test_a_take_that_was_chosen_stays_with_its_clip(tmp_path: Path) -> None:
    chains = chains_of(tmp_path)
    name = asyncio.run(chains.intake.create({"prompt": "x", "num_videos": 3})).id
    settings = chains.get(name).settings
    chains.queue.change(name, settings={**settings, "take": [[1, 2], [2, 2], [3, 1]]})
    assert asyncio.run(chains.change(name, count=2)).settings["take"] == [[1, 2], [2, 2]]
    assert asyncio.run(chains.change(name, clips={1: {"prompt": "y"}})).settings["take"] == [[2, 2]]


class Planner:
    """Stands for the process that plans: what it was asked, and how it ended."""

    def __init__(self, printed: bytes = b"", code: int | None = 0, *, hangs: bool = False) -> None:
        self.printed, self.code, self.hangs, self.calls = printed, code, hangs, list[Any]()
        self.returncode: int | None = None

    async def begin(self, *words: str, **_: Any) -> Planner:
        self.calls.append(words)
        return self

    async def communicate(self, asked: bytes) -> tuple[bytes, None]:
        self.calls.append(json.loads(asked))
        if self.hangs:
            raise asyncio.TimeoutError
        self.returncode = self.code
        return self.printed, None

    def kill(self) -> None:
        self.calls.append("kill")

    async def wait(self) -> None:
        self.calls.append("wait")


def test_a_plan_is_made_of_all_settings_and_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(b"2 clips, in /srv/run\nanother\n")
    monkeypatch.setattr(asyncio, "create_subprocess_exec", planner.begin)
    order = {"output_dir": "/srv/run", "prompt": "x"}
    assert asyncio.run(plan_of(Settings(sample_steps=7), order)) == ["2 clips", "another"]
    assert planner.calls == [
        (sys.executable, "-m", "wan.server.plan"),
        {"owner": {"sample_steps": 7}, "settings": order},
    ]
    for code, status in ((2, 500), (-9, 500)):  # without a word
        monkeypatch.setattr(asyncio, "create_subprocess_exec", Planner(b"", code).begin)
        with pytest.raises(ApiError) as wrong:
            asyncio.run(plan_of(Settings(), order))
        assert wrong.value.status == status
    slow = Planner(hangs=True)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow.begin)
    monkeypatch.setattr("wan.server.planning.kill", Planner.kill)
    with pytest.raises(ApiError, match="the plan takes too long") as wrong:
        asyncio.run(plan_of(Settings(), order))
    assert wrong.value.status == 503 and slow.calls[2:] == ["kill", "wait"]


@pytest.mark.parametrize(("wrong", "code", "printed"), [(False, 0, "one\ntwo\n"), (True, 2, "no such file\n")])
def test_a_plan_is_a_dry_run(
    wrong: bool, code: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan.server import plan

    class Chain:
        def __init__(self, settings: Settings) -> None:
            assert settings == Settings(ckpt_dir="m", prompt="x", take=((1, 2),), dry_run=True)

        def outline(self) -> list[str]:
            if wrong:
                raise UserError("no such file")
            return ["one", "two"]

    monkeypatch.setattr(plan, "Chain", Chain)
    asked = {"owner": {"ckpt_dir": "m", "gone": 1}, "settings": {"prompt": "x", "take": [[1, 2]]}}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    assert plan.main() == code and capsys.readouterr().out == printed


def test_settings_are_the_same_on_their_way_through_json() -> None:
    given = Settings(ckpt_dir="m", sample_guide_scale=(1.0, 2.0), take=((1, 2), (3, 4)), lora=("a", "b"), quiet=True)
    values = json.loads(json.dumps(as_json(given)))
    assert set(values) == {"ckpt_dir", "sample_guide_scale", "take", "lora", "quiet"}
    assert owner_settings(values) == given and owner_settings({"gone": 1}) == Settings()
    assert settings_of_chain(given, {"take": [], "prompt": "x"}) == dataclasses.replace(given, take=(), prompt="x")


def test_a_server_offers_the_sizes_of_its_model_and_so_many_frames(tmp_path: Path) -> None:
    offer = chains_of(tmp_path, max_frames=500, takes=2).offer
    assert (offer.model, offer.fps, offer.size({}), offer.pixels({})) == (
        "wan2.2-ti2v-5b",
        24.0,
        "1280*704",
        (1280, 704),
    )
    assert (offer.size({"size": "704*1280"}), offer.pixels({"size": "704*1280"})) == ("704*1280", (704, 1280))
    owned = chains_of(tmp_path / "b", size="704*1280").offer
    assert owned.size({}) == "704*1280" and owned.size({"size": "1280*704"}) == "1280*704"
    for name in ("wan2.2-ti2v-5b", "WAN2.2-TI2V-5B", "v2v-5b", "ti2v-5B", None):
        offer.check_model(name)
    with pytest.raises(ApiError) as wrong:
        offer.check_model("x" * 99)
    assert (wrong.value.param, wrong.value.code) == ("model", "model_not_found")
    assert str(wrong.value) == f"this server has no model {'x' * 60!r}; it has wan2.2-ti2v-5b, v2v-5B, ti2v-5B"
    for ticket, scenes, frames in (
        (Ticket("a", count=3), [], 3 * 81 * 2),
        (Ticket("a", count=4), [], 4 * 81 * 2),
        (Ticket("a", count=4, base=2), [], 2 * 81 * 2),
        (Ticket("a", count=4, base=2), [{"takes": 9}, {}, {"takes": 1}, {"frames": 5}], 81 + 5 * 2),
        (Ticket("a", count=2, settings={"frame_num": 5, "takes": 3}), [], 2 * 5 * 3),
        (Ticket("a", count=2, settings={"frame_num": 121, "best_of": 2}), [{"takes": 3}], 121 * 3 + 121 * 2),
    ):
        if frames <= 500:
            offer.check(ticket, scenes)
        else:
            with pytest.raises(ApiError, match=f"^{frames} frames are more than the 500 that this server makes"):
                offer.check(ticket, scenes)
    exact = chains_of(tmp_path / "c", max_frames=162).offer
    exact.check(Ticket("a", count=2), [])
    for settings, param in (({"takes": 2, "best_of": 2}, "takes"), ({"size": "832*480"}, "size")):
        with pytest.raises(ApiError) as wrong:
            offer.check(Ticket("a", count=1, settings=settings), [])
        assert wrong.value.param == param
    for ask in (offer.clips_of, offer.seconds_of):
        with pytest.raises(ApiError):
            ask({"context_frames": 3, "continuation": "tail"}, 1, False)


def test_a_longer_context_leaves_fewer_new_frames(tmp_path: Path) -> None:
    offer = chains_of(tmp_path).offer
    tail = {"continuation": "tail", "context_frames": 9}
    assert offer.seconds_of(tail, 3, still=False) == 3 * (81 - 9) / 24
    assert offer.seconds_of(tail, 3, still=True) == (81 + 2 * (81 - 9)) / 24
    assert offer.clips_of(tail, 72 / 24, still=False) == 1 and offer.clips_of(tail, 73 / 24, still=False) == 2


def test_a_server_s_numbers_have_their_names() -> None:
    metrics = Metrics()
    for one in (metrics.clips, metrics.steps, metrics.workers):
        one.inc()
    metrics.chains.labels("failed").inc(2)
    metrics.tickets.labels("queued").set(3)
    metrics.busy.set(True)
    metrics.requests.labels("GET", "2xx").inc()
    metrics.latency.labels("GET").observe(0.3)
    lines = metrics.page().decode().splitlines()
    assert {
        "wan_clips_total 1.0",
        "wan_step_reports_total 1.0",
        "wan_workers_lost_total 1.0",
        'wan_chains_ended_total{state="failed"} 2.0',
        'wan_chains{state="queued"} 3.0',
        "wan_worker_busy 1.0",
        'wan_requests_total{method="GET",status="2xx"} 1.0',
        'wan_request_seconds_bucket{le="0.25",method="GET"} 0.0',
        'wan_request_seconds_bucket{le="1.0",method="GET"} 1.0',
    } <= set(lines)
    bounds = [line.partition('le="')[2].partition('"')[0] for line in lines if "seconds_bucket" in line]
    assert bounds == ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "1.0", "5.0", "30.0", "+Inf"]
    assert Metrics().page() != metrics.page()  # each server has its own


def test_folders_of_chains_go_at_once_in_name(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)

    async def fill(name: str | None) -> None:
        async with jobs.new() as folder:
            (folder.path / "a").touch()
            assert folder.path.stat().st_mode & 0o777 == 0o700
            if name is None:
                raise UserError("the client has gone")
            jobs.keep(folder, name)

    asyncio.run(fill("a"))
    with pytest.raises(UserError):
        asyncio.run(fill(None))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and "a" in jobs and "b" not in jobs
    assert jobs["a"] is jobs["a"] and jobs["a"].path == tmp_path / "a"
    before = jobs["a"]
    jobs.remove("a")
    assert list(tmp_path.iterdir()) == [] and jobs["a"] is not before
    known = new_id()
    for name in (known, new_id(), f".gone-{new_id()}", f".new-{new_id()}", "video_x", f"{new_id()}0"):
        (tmp_path / name).mkdir()
    jobs.remove_all_but([known])
    assert {len(path.name) for path in tmp_path.iterdir()} == {len(known), 7, len(known) + 1}
    Jobs(tmp_path / "nowhere").remove_all_but([])


def test_a_question_that_was_left_leaves_its_answer_to_nobody() -> None:
    sent, looks = list[Any](), list[int]()
    questions = Questions(lambda event, **more: sent.append((event, more)), lambda: looks.append(1))
    for number in (5, 1, 2):  # of another time, and that of the next one, which waits
        questions.hear({"number": number, "answer": {"text": str(number)}})
    assert questions.ask({"what": "a"}) == {"text": "1"} and questions.ask({"what": "b"}) == {"text": "2"}
    assert sent == [("ask", {"number": 1, "asked": {"what": "a"}}), ("ask", {"number": 2, "asked": {"what": "b"}})]
    assert len(looks) == 3


def test_a_folder_whose_files_stay_costs_nobody_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path / "deep/jobs")

    def stay(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "it is in use")

    async def fill(fails: bool) -> None:
        async with jobs.new() as folder:
            if fails:
                raise UserError("the client has gone")
            jobs.keep(folder, known)

    known, gone = new_id(), new_id()
    asyncio.run(fill(False))
    (jobs.path / gone).mkdir()
    monkeypatch.setattr("os.rmdir", stay)
    with pytest.raises(UserError, match="the client has gone"):
        asyncio.run(fill(True))
    jobs.remove_all_but([known])
    jobs.remove(known)
    assert known not in jobs and MOST_PICTURES == 50


def test_a_question_waits_for_its_answer_as_long_as_the_chain_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.server.questions.LOOK_SECONDS", 0.001)
    looks = list[int]()

    def look() -> None:
        looks.append(1)
        if len(looks) == 5:
            questions.hear({"number": 1, "answer": {"text": "late"}})

    questions = Questions(lambda event, **more: None, look)
    assert questions.ask({"what": "a"}) == {"text": "late"} and len(looks) == 5
