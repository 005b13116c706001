"""What a server answers, without a worker: chains as they are asked for, changed, looked at and removed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import wan
from tests.support.served import form
from tests.support.site import PICTURE, VIDEO, Answer, Site
from wan.server import app, chain_routes, chains, page_routes, videos
from wan.server.errors import ApiError
from wan.server.supervisor import WORKER
from wan.server.tickets import DONE, DRAFT, FAILED, MAKING, PAUSED, QUEUED

FOOTAGE = ("video", "C:\\films\\boat.mp4", VIDEO)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def scenes(site: Site, name: str) -> list[Any]:
    return site.chains.folder(name).read_clips()


def woken(site: Site) -> bool:
    """Whether the supervisor was told that there is something to do, since the last look."""
    was = site.supervisor._wake.is_set()
    site.supervisor._wake.clear()
    return was


def making(site: Site, name: str, clip: int = 1) -> Any:
    """Let the worker be at a clip of a chain."""
    site.queue.change(name, state=MAKING)
    site.supervisor.making = name
    site.supervisor.audience.begin(name)
    live = site.supervisor.audience.of(name)
    live.hear("clip_started", {"clip": clip})
    return live


def stops(site: Site, name: str) -> bool:
    """Whether the run was asked to stop, taken back."""
    stop = site.chains.folder(name).run / "stop"
    was = stop.exists()
    stop.unlink(missing_ok=True)
    return was


# --- new chains


def test_a_chain_from_text_waits_for_the_worker(site: Site) -> None:
    answer = site.post("/v1/chains", {"prompt": "A boat.", "num_videos": 3, "settings": {"sample_steps": 4}})
    chain = answer.json
    name = chain["id"]
    assert answer.status == 201 and re.fullmatch("video_[0-9a-f]{32}", name) and woken(site)
    assert abs(chain.pop("created_at") - time.time()) < 60
    seed = chain["settings"].pop("base_seed")
    assert 0 <= seed < 2**31
    assert chain == {
        "id": name,
        "object": "chain",
        "status": "queued",
        "completed_at": None,
        "error": None,
        "model": "wan2.2-ti2v-5b",
        "title": "",
        "prompt": "A boat.",
        "size": "1280x704",
        "fps": 24.0,
        "seconds": (81 + 2 * 80) / 24,
        "progress": 0,
        "clips_asked": 3,
        "clips_finished": 0,
        "extends": None,
        "remixed_from": None,
        "settings": {"prompt": "A boat.", "sample_steps": 4},
        "now": None,
        "warnings": [],
        "clips": [clip(number, {"cut": True, "prompt": "A boat."} if number == 1 else {}) for number in (1, 2, 3)],
        "drift": None,
    }
    folder = site.folder / "jobs" / name
    assert {path.name for path in folder.iterdir()} == {"source.png", "storyboard.json"}
    with Image.open(folder / "source.png") as start:
        assert start.size == (1280, 704) and start.getpixel((0, 0)) == (110, 110, 110)
    assert site.ticket(name).still and site.ticket(name).source == "source.png"
    assert site.chains.order_of(site.ticket(name)) == {
        **site.ticket(name).settings,
        "video": str(folder / "source.png"),
        "storyboard": str(folder / "storyboard.json"),
        "output_dir": str(folder / "run"),
        "num_videos": 3,
        "yes": True,
        "preview": True,
        "quiet": True,
        "log_file": None,
    }


def clip(number: int, scene: Any, **facts: Any) -> dict[str, Any]:
    known = dict.fromkeys(("prompt", "answers", "seed", "seam", "candidates", "seconds", "start", "length"))
    facts = {"finished": False, "takes": [], "version": None, "take": None, **facts}
    return {"number": number, "said": scene, **known, **facts}


def test_a_chain_from_footage_goes_on_from_it(site: Site) -> None:
    answer = site.post("/v1/chains", {"prompt": "On.", "seconds": "7"}, FOOTAGE)
    ticket = site.ticket(answer.json["id"])
    assert answer.status == 201 and (ticket.title, ticket.source, ticket.still) == ("boat.mp4", "source.mp4", False)
    assert (ticket.count, ticket.seconds) == (3, 10.0) and "include_source" not in ticket.settings
    folder = site.chains.folder(ticket.id).path
    assert {path.name for path in folder.iterdir()} == {"source.mp4", "source.png", "storyboard.json"}
    assert (folder / "source.mp4").read_bytes() == VIDEO and scenes(site, ticket.id) == [{}]


def test_a_chain_from_a_picture_begins_with_it(site: Site) -> None:
    answer = site.post("/v1/chains", {"clips": '[{"seed": 5}, {"prompt": "It turns."}]'}, ("video", "a.png", PICTURE))
    ticket = site.ticket(answer.json["id"])
    assert (ticket.title, ticket.source, ticket.still, ticket.prompt) == ("a.png", "source.png", True, None)
    folder = site.chains.folder(ticket.id).path
    assert {path.name for path in folder.iterdir()} == {"source.png", "storyboard.json"}
    assert scenes(site, ticket.id) == [{"cut": "source.png", "seed": 5}, {"prompt": "It turns."}]
    assert ticket.count == 2


def test_a_draft_waits_for_a_word(site: Site) -> None:
    for start in (False, "false"):
        name = site.new(start=start)
        assert site.ticket(name).state == DRAFT and site.ask(f"/v1/videos/{name}").status == 404
        assert site.ask("/v1/videos").json["data"] == []
        assert [one["id"] for one in site.ask("/v1/chains").json["data"]][0] == name
    site.supervisor._wake.clear()
    answer = site.post(f"/v1/chains/{name}/start")
    assert (answer.status, answer.json["status"]) == (200, "queued") and woken(site)
    assert site.post(f"/v1/chains/{name}/start").error == (409, "the chain is queued", None)
    for start in (True, "true", "yes"):
        assert site.ticket(site.new(start=start)).state == QUEUED


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, (400, "a video from text alone needs a prompt", "prompt")),
        ({"prompt": "x", "clips": [1]}, (400, "clips must be a list of objects", "clips")),
        ({"prompt": "x", "clips": [{}, {"lora": 1}]}, (400, "clip 2: 'lora' is nothing that a clip has", "clips")),
        ({"prompt": "x", "model": "sora-2"}, (400, "this server has no model 'sora-2'", "model")),
        ({"prompt": "x", "sample_steps": 0}, (400, "sample_steps must be at least 1, 0 is not", "sample_steps")),
        ({"prompt": "x", "size": "1x1"}, (400, "size must be one of 1280x704, 704x1280", "size")),
        ({"prompt": "x", "takes": 2, "best_of": 2}, (400, "takes chooses as best_of does", "takes")),
        ({"prompt": "x", "seconds": 1e4}, (400, "243000 frames are more than the 20000", "seconds")),
        ([1], (400, "the request must be a JSON object", None)),
        (b"{", (400, "the request", None)),
        (b"\xff", (400, "the request", None)),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(body: Any, error: Any, site: Site) -> None:
    status, message, param = site.post("/v1/chains", body).error
    assert (status, param) == (error[0], error[2]) and message.startswith(error[1]), message
    assert list((site.folder / "jobs").iterdir()) == [] and site.queue.all() == [] and not woken(site)


def test_a_file_that_is_none_is_refused_and_leaves_nothing(site: Site) -> None:
    why = "the file is neither a video nor a picture that can be read"
    assert site.post("/v1/chains", {"prompt": "x"}, ("video", "a.mp4", b"?")).error == (400, why, None)
    two = site.post("/v1/chains", {"prompt": "x"}, FOOTAGE, FOOTAGE)
    assert two.error == (400, "video must be one file", "video")
    assert list((site.folder / "jobs").iterdir()) == []
    # a field without a file is what a browser sends of one that is empty
    assert site.post("/v1/chains", {"prompt": "x"}, ("video", "", b"")).status == 201


def test_two_experts_need_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, experts=2)
    assert site.post("/v1/chains", {"prompt": "x"}).error == (
        400,
        "this server's model makes no video from text alone; send a picture or a video",
        "input_reference",
    )
    answer = site.post("/v1/chains", {"prompt": "x"}, ("video", "a.png", PICTURE))
    assert answer.json["model"] == "wan2.2-i2v-a14b" and answer.json["fps"] == 16.0
    assert site.ask("/v1/models").json == {
        "object": "list",
        "data": [{"id": "wan2.2-i2v-a14b", "object": "model", "created": 0, "owned_by": "wan"}],
    }


def test_clips_name_the_pictures_that_come_with_them(site: Site) -> None:
    body = {"prompt": "x", "clips": json.dumps([{}, {"cut": "night.png"}])}
    answer = site.post("/v1/chains", body, ("pictures", "night.png", PICTURE), ("pictures", "b.png", PICTURE))
    name = answer.json["id"]
    kept = sorted(path.name for path in site.chains.folder(name).path.glob("*picture*"))
    assert len(kept) == 2 and all(re.fullmatch("picture_[0-9a-f]{8}.png", one) for one in kept)
    assert scenes(site, name)[1]["cut"] in kept and answer.json["clips_asked"] == 2
    # later those of before are known by their names here
    change = site.post(f"/v1/chains/{name}/clips/2", {"cut": kept[1]}, method="PATCH")
    assert change.status == 200 and scenes(site, name)[1] == {"cut": kept[1]}
    wrong = site.post("/v1/chains", {"prompt": "x"}, ("pictures", "a.mp4", VIDEO))
    assert wrong.error == (400, "'a.mp4' is no picture", "pictures")
    assert len(list((site.folder / "jobs").iterdir())) == 1


def test_a_chain_takes_so_many_pictures(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.server.jobs.MOST_PICTURES", 3)
    pictures = [("pictures", f"{number}.png", PICTURE) for number in range(4)]
    too_many = (400, "a chain takes 3 pictures", "pictures")
    assert site.post("/v1/chains", {"prompt": "x"}, *pictures).error == too_many
    name = site.post("/v1/chains", {"prompt": "x"}, *pictures[:2]).json["id"]
    assert site.post(f"/v1/chains/{name}", {}, *pictures[:2], method="PATCH").error == too_many
    assert site.post(f"/v1/chains/{name}", {}, pictures[0], method="PATCH").status == 200
    assert len(list(site.chains.folder(name).path.glob("picture_*"))) == 3


def test_so_many_chains_wait_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, max_queue=2)
    first, second = site.new(), site.new()
    for path in ("/v1/chains", "/v1/videos"):
        full = site.post(path, {"prompt": "x"})
        assert full.error == (429, "2 chains are waiting already; try again later", None)
        assert full.headers["retry-after"] == "60" and full.json["error"]["code"] == "rate_limit_exceeded"
    site.finish(first)
    third = site.new(start=False)
    assert site.post(f"/v1/chains/{third}/start").status == 200
    assert site.post(f"/v1/videos/{first}/remix", {"prompt": "x"}).status == 429
    assert site.post("/v1/videos/extensions", {"prompt": "x", "video": {"id": first}}).status == 429
    site.queue.change(second, state=FAILED)
    assert site.post(f"/v1/videos/{first}/remix", {"prompt": "x"}).status == 200
    assert site.post(f"/v1/chains/{second}/resume").status == 429


# --- changing


def test_a_chain_that_waits_is_changed_and_keeps_its_place(site: Site) -> None:
    name = site.new(num_videos=2, clips=[{}, {"prompt": "b", "seed": 3}])
    waits_since, seed = site.ticket(name).queued_at, site.ticket(name).settings["base_seed"]
    body = {
        "num_videos": 4,
        "settings": {"prompt": "new", "sample_steps": 4},
        "clips": {"2": {"seed": None, "steps": 9}, "4": {"prompt": "d"}},
    }
    answer = site.post(f"/v1/chains/{name}", body, method="PATCH")
    assert answer.status == 200 and (answer.json["status"], answer.json["clips_asked"]) == ("queued", 4)
    ticket = site.ticket(name)
    assert (ticket.prompt, ticket.settings["sample_steps"], ticket.queued_at) == ("new", 4, waits_since)
    assert ticket.settings["base_seed"] == seed
    assert scenes(site, name)[1:] == [{"prompt": "b", "steps": 9}, {}, {"prompt": "d"}]
    assert site.post(f"/v1/chains/{name}", {"settings": {"num_videos": 3}}, method="PATCH").json["clips_asked"] == 3
    assert len(scenes(site, name)) == 3 and not stops(site, name)
    assert site.post(f"/v1/chains/{name}", {"settings": {"base_seed": -1}}, method="PATCH").status == 200
    assert site.ticket(name).settings["base_seed"] >= 0
    draft = site.new(start="false")
    assert site.post(f"/v1/chains/{draft}", {"num_videos": 2}, method="PATCH").json["status"] == "draft"


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("", {"fps": 3}, (400, "'fps' cannot be changed", None)),
        ("", {"clips": {"x": {}}}, (400, 'clips must be objects by number: {"3": {…}}', "clips")),
        ("", {"clips": {"123456": {}}}, (400, 'clips must be objects by number: {"3": {…}}', "clips")),
        ("", {"clips": {"1": 3}}, (400, 'clips must be objects by number: {"3": {…}}', "clips")),
        ("", {"clips": {"3": {}}}, (400, "there is no clip 3 of 2", "clips")),
        ("", {"clips": {"0": {}}}, (400, "there is no clip 0 of 2", "clips")),
        ("", {"num_videos": 20000}, (400, "1620000 frames are more than the 20000 that this server", "seconds")),
        ("/clips/3", {"seed": 1}, (400, "there is no clip 3 of 2", "clips")),
        ("/clips/x", {"seed": 1}, (400, "number: Input should be a valid integer", "number")),
    ],
)
def test_a_change_that_cannot_be_changes_nothing(path: str, body: Any, error: Any, site: Site) -> None:
    name = site.new(num_videos=2)
    before = site.ticket(name), scenes(site, name)
    status, message, param = site.post(f"/v1/chains/{name}{path}", body, method="PATCH").error
    assert (status, param) == (error[0], error[2]) and message.startswith(error[1]), message
    assert body == {"fps": 3} or (site.ticket(name), scenes(site, name)) == before


def test_a_finished_chain_that_is_changed_is_made_again_from_there(site: Site) -> None:
    name = site.new(num_videos=3)
    for path, body, done in (
        ("/clips/2", {"prompt": "b"}, 1),
        ("/clips/3", {"prompt": "c"}, 2),
        ("/clips/3", {"prompt": "c"}, 3),  # which it is
        ("", {"num_videos": 5}, 3),
    ):
        site.finish(name)
        site.queue.change(name, done=3)
        site.chains.folder(name).ask_to_stop()
        site.supervisor._wake.clear()
        answer = site.post(f"/v1/chains/{name}{path}", body, method="PATCH")
        assert (answer.json["status"], answer.json["clips_finished"]) == ("queued", done)
        assert answer.json["completed_at"] is None and not stops(site, name) and woken(site)
    # an empty field of a form takes a thing out
    answer = site.post(f"/v1/chains/{name}/clips/2", {"prompt": ""}, ("x", "", b""), method="PATCH")
    assert answer.status == 200 and scenes(site, name)[1] == {}


@pytest.mark.parametrize(
    ("path", "body", "stop"),
    [
        ("/clips/3", {"prompt": "c"}, False),  # which the run reads when it is there
        ("/clips/2", {"prompt": "b"}, True),
        ("/clips/1", {"prompt": "a"}, True),
        ("", {"num_videos": 5}, True),
        ("", {"settings": {"sample_steps": 9}}, True),
        ("", {}, False),
    ],
)
def test_a_chain_that_is_changed_while_it_is_made_stops_where_that_is_behind(
    path: str, body: Any, stop: bool, site: Site
) -> None:
    name = site.new(num_videos=3)
    making(site, name, clip=2)
    answer = site.post(f"/v1/chains/{name}{path}", body, method="PATCH")
    assert (answer.json["status"], stops(site, name), site.ticket(name).again) == ("in_progress", stop, True)


def test_a_clip_is_made_again_with_another_seed(site: Site) -> None:
    name = site.new(num_videos=2, clips=[{}, {"prompt": "b", "seed": 5}])
    site.finish(name)
    answer = site.post(f"/v1/chains/{name}/clips/2/redo", {"steps": 4, "prompt": ""})
    assert (answer.status, answer.json["status"], answer.json["clips_finished"]) == (200, "queued", 1)
    scene = scenes(site, name)[1]
    assert scene.pop("seed") != 5 and scene == {"prompt": "b", "steps": 4}
    assert site.post(f"/v1/chains/{name}/clips/2/redo", {"seed": 7}).json["clips"][1]["said"]["seed"] == 7
    assert 0 <= site.post(f"/v1/chains/{name}/clips/2/redo", {"seed": ""}).json["clips"][1]["said"]["seed"] < 2**31


def takes(site: Site, name: str, number: int, count: int) -> None:
    folder = site.chains.folder(name).run / f"takes/{number}"
    folder.mkdir(parents=True)
    for take in range(1, count + 1):
        for ending in (".json", ".mp4"):
            (folder / f"take_{take}_seed{100 * take}{ending}").write_text(f"take {take}")


def test_another_take_is_gone_on_from(site: Site) -> None:
    name = site.new(num_videos=3)
    site.finish(name)
    takes(site, name, 2, 3)
    chain = site.ask(f"/v1/chains/{name}").json
    assert [one["takes"] for one in chain["clips"]] == [[], [1, 2, 3], []]
    assert [one["take"] for one in chain["clips"]] == [None] * 3  # its seed is that of none
    assert site.post(f"/v1/chains/{name}/clips/2/take", {"take": 4}).error == (400, "clip 2 has no take 4", "take")
    assert site.post(f"/v1/chains/{name}/clips/2/take", {}).error == (400, "take is missing", "take")
    answer = site.post(f"/v1/chains/{name}/clips/2/take", {"take": 3})
    assert (answer.json["status"], answer.json["clips_finished"]) == ("queued", 1)
    site.queue.change(name, settings={**site.ticket(name).settings, "take": [[1, 1], [2, 3]]})
    live = making(site, name)
    assert site.post(f"/v1/chains/{name}/clips/2/take", {"take": 2}).json["status"] == "in_progress"
    ticket = site.ticket(name)
    assert ticket.settings["take"] == [[1, 1], [2, 2]] and stops(site, name) and ticket.again and live.clip == 1
    report = site.chains.folder(name).run / "report.json"
    facts = json.loads(report.read_text("utf-8"))
    facts["clips"][1]["seed"] = 200
    report.write_text(json.dumps(facts), encoding="utf-8")
    assert site.ask(f"/v1/chains/{name}").json["clips"][1]["take"] == 2


def test_a_chain_rests_and_goes_on(site: Site) -> None:
    name = site.new()
    events = site.supervisor.audience.of(name).events
    assert site.post(f"/v1/chains/{name}/pause").json["status"] == "paused"
    assert [(one["event"], one["state"]) for one in events] == [("state", PAUSED)]
    assert site.post(f"/v1/chains/{name}/pause").error == (409, "the chain is paused", None)
    assert site.post(f"/v1/chains/{name}/resume").json["status"] == "queued"
    assert events[-1]["state"] == QUEUED and woken(site)
    making(site, name)
    site.queue.change(name, again=True)
    assert site.post(f"/v1/chains/{name}/pause").json["status"] == "in_progress"
    assert stops(site, name) and not site.ticket(name).again
    site.chains.folder(name).ask_to_stop()
    site.queue.change(name, state=FAILED, error={"code": "x", "message": "y"}, attempts=3)
    assert site.post(f"/v1/chains/{name}/resume").json["error"] is None
    assert site.ticket(name).attempts == 0 and not stops(site, name)


def test_a_chain_is_removed_with_its_files_when_nobody_makes_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name, states = site.new(), list[str]()

    async def cancel(one: str) -> None:
        states.append(site.ticket(one).state)

    monkeypatch.setattr(site.supervisor, "cancel", cancel)
    listened = site.supervisor.audience.of(name)
    assert site.ask(f"/v1/chains/{name}", "DELETE").json == {"id": name, "object": "chain.deleted", "deleted": True}
    assert states == [PAUSED] and list((site.folder / "jobs").iterdir()) == [] and listened is not None
    assert site.supervisor.audience.get(name) is None
    for path, method in ((f"/v1/chains/{name}", "GET"), (f"/v1/videos/{name}", "DELETE"), (f"/chains/{name}", "GET")):
        assert site.ask(path, method).status == 404
    other = site.new()
    site.finish(other)
    assert site.ask(f"/v1/videos/{other}", "DELETE").json == {"id": other, "object": "video.deleted", "deleted": True}
    assert states == [PAUSED, DONE]


def test_drafts_of_a_day_are_removed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old, fresh, waiting = site.new(start=False), site.new(start=False), site.new()
    now, waits = time.time(), list[float]()
    site.queue.change(old, created_at=int(now - 86400 - 5))
    site.queue.change(fresh, created_at=int(now - 86400 + 60))
    site.queue.change(waiting, created_at=5)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        raise asyncio.CancelledError

    monkeypatch.setattr(chains.asyncio, "sleep", sleep)  # type: ignore[attr-defined]
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(site.chains.drop_old_drafts())
    assert {one.id for one in site.queue.all(drafts=True)} == {fresh, waiting} and waits == [3600]


def test_after_a_crash_what_was_half_made_waits_again_and_goes_on(site: Site) -> None:
    names = {state: site.new() for state in ("made", "changed", "stopped", "changed at rest")}
    site.queue.change(names["made"], state=MAKING)
    site.queue.change(names["changed"], state=MAKING, again=True)
    site.queue.change(names["stopped"], state=PAUSED)
    site.queue.change(names["changed at rest"], state=PAUSED, again=True)
    for name in names.values():
        site.chains.folder(name).ask_to_stop()
    site.chains.tidy()
    assert {what: site.ticket(name).state for what, name in names.items()} == {
        "made": QUEUED,
        "changed": QUEUED,
        "stopped": PAUSED,
        "changed at rest": PAUSED,
    }
    assert {what for what, name in names.items() if stops(site, name)} == {"made", "stopped"}
    assert not any(site.ticket(name).again for name in names.values())


# --- looking


def test_chains_are_listed_the_newest_first(site: Site) -> None:
    names = [site.new() for _ in range(3)][::-1]
    listed = site.ask("/v1/chains").json
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == names
    assert "clips" not in listed["data"][0] and "drift" not in listed["data"][0]
    assert [one["id"] for one in site.ask("/v1/chains?limit=1").json["data"]] == names[:1]
    assert site.ask("/v1/chains?limit=1000").status == 200
    for limit in (0, 1001):
        assert site.ask(f"/v1/chains?limit={limit}").error == (400, "limit must be from 1 to 1000", "limit")


def test_videos_are_listed_page_by_page(site: Site) -> None:
    names = [site.new() for _ in range(3)]
    site.new(start=False)

    def ids(query: str) -> tuple[list[str], bool, str | None, str | None]:
        page = site.ask(f"/v1/videos{query}").json
        return [one["id"] for one in page["data"]], page["has_more"], page["first_id"], page["last_id"]

    assert ids("") == (names[::-1], False, names[2], names[0])
    assert ids("?limit=2") == (names[:0:-1], True, names[2], names[1])
    assert ids("?limit=3") == (names[::-1], False, names[2], names[0])
    assert ids(f"?limit=2&after={names[1]}") == (names[:1], False, names[0], names[0])
    assert ids("?order=asc&limit=1") == (names[:1], True, names[0], names[0])
    assert ids(f"?after={names[0]}") == ([], False, None, None)
    assert site.ask("/v1/videos?limit=100").status == 200 and site.ask("/v1/videos?after=x").status == 404
    for limit in (0, 101):
        assert site.ask(f"/v1/videos?limit={limit}").error == (400, "limit must be from 1 to 100", "limit")
    assert site.ask("/v1/videos?order=up").error[0] == 400


def test_a_video_is_told_as_openai_does(site: Site) -> None:
    name = site.post("/v1/videos", {"prompt": "A boat.", "seconds": "4", "size": "704x1280"}).json["id"]
    assert site.ticket(name).settings["custom_prompt"] == "" and site.ticket(name).count == 2
    video = site.ask(f"/v1/videos/{name}").json
    created = site.ticket(name).created_at
    assert video == {
        "id": name,
        "object": "video",
        "created_at": created,
        "completed_at": None,
        "expires_at": None,
        "error": None,
        "model": "wan2.2-ti2v-5b",
        "progress": 0,
        "prompt": "A boat.",
        "remixed_from_video_id": None,
        "seconds": f"{161 / 24:g}",
        "size": "704x1280",
        "status": "queued",
    }
    site.finish(name)
    video = site.ask(f"/v1/videos/{name}").json
    assert (video["status"], video["progress"], video["size"], video["completed_at"]) == (DONE, 100, "832x480", 1234)
    for state, told in ((PAUSED, "in_progress"), (MAKING, "in_progress"), (FAILED, "failed"), (QUEUED, "queued")):
        site.queue.change(name, state=state)
        video = site.ask(f"/v1/videos/{name}").json
        assert (video["status"], video["progress"], video["completed_at"]) == (told, 99, None)


def test_a_video_needs_a_prompt_and_its_picture_as_a_file(site: Site) -> None:
    for body, error in (
        ({}, (400, "prompt is missing", "prompt")),
        ({"prompt": "x", "seconds": "-1"}, (400, "seconds must be a positive number", "seconds")),
        (
            {"prompt": "x", "input_reference": "http://a"},
            (400, "send input_reference as a file: this server fetches nothing", "input_reference"),
        ),
    ):
        assert site.post("/v1/videos", body).error == error
    answer = site.post("/v1/videos", {"prompt": "x"}, ("input_reference", "a.mp4", VIDEO))
    assert answer.status == 200 and site.ticket(answer.json["id"]).source == "source.mp4"
    assert "include_source" not in site.ticket(answer.json["id"]).settings


def test_footage_that_is_extended_comes_first(site: Site) -> None:
    answer = site.post("/v1/videos/extensions", {"prompt": "On.", "seconds": "4"}, FOOTAGE)
    ticket = site.ticket(answer.json["id"])
    assert answer.status == 200 and ticket.settings["include_source"] is True
    assert (ticket.count, ticket.seconds) == (2, 2.0 + 160 / 24) and ticket.settings["custom_prompt"] == ""
    still = site.post("/v1/videos/extensions", {"prompt": "On."}, ("video", "a.png", PICTURE))
    assert still.error == (400, "video must be a video; send a picture to v1/videos", "video")
    assert [one.id for one in site.queue.all()] == [ticket.id] and len(list((site.folder / "jobs").iterdir())) == 1


def test_a_finished_video_is_extended_from_its_last_clip(site: Site) -> None:
    first = site.new(num_videos=2, clips=[{"seed": 5}], settings={"sample_steps": 4})
    waiting = site.post("/v1/videos/extensions", {"prompt": "On.", "video": {"id": first}})
    assert waiting.error == (400, "the video is queued; only a completed one can be extended", "video")
    before = site.finish(first)
    site.supervisor._wake.clear()
    answer = site.post("/v1/videos/extensions", {"prompt": "It stops.", "video": {"id": first}})
    ticket = site.ticket(answer.json["id"])
    assert answer.status == 200 and (ticket.state, ticket.extends, ticket.prompt) == (QUEUED, first, "It stops.")
    assert (ticket.count, ticket.base, ticket.done, ticket.completed_at) == (3, 2, 2, None) and woken(site)
    assert ticket.seconds == before.seconds + 80 / 24 and ticket.settings == before.settings
    assert scenes(site, ticket.id) == [
        {"cut": True, "seed": 5, "prompt": "A boat."},
        {},
        {"prompt": "It stops.", "custom_prompt": ""},
    ]
    folder = site.chains.folder(ticket.id)
    assert (folder.path / "source.png").samefile(site.chains.folder(first).path / "source.png")
    for ending in (".mp4", ".json", ".safetensors"):
        assert (folder.run / f"video_2{ending}").read_text() == f"2{ending}"
    longer = site.post("/v1/videos/extensions", {"prompt": "On.", "seconds": "7", "video": {"id": first}})
    assert site.ticket(longer.json["id"]).count == 5
    (site.chains.folder(first).run / "video_2.mp4").unlink()
    gone = site.post("/v1/videos/extensions", {"prompt": "On.", "video": {"id": first}})
    assert gone.error == (409, "files of the video are missing; it cannot be extended", None)
    # what an extension makes again is its own clips
    site.finish(ticket.id)
    again = site.post(f"/v1/videos/{ticket.id}/remix", {"prompt": "It turns."})
    remix = site.ticket(again.json["id"])
    assert again.json["remixed_from_video_id"] == ticket.id and (remix.done, remix.base) == (2, 2)
    assert [one.get("prompt") for one in scenes(site, remix.id)] == ["A boat.", None, "It turns."]
    assert remix.settings["prompt"] == "A boat." and remix.prompt == "It turns."
    (site.chains.folder(ticket.id).run / "video_2.mp4").unlink()
    gone = site.post(f"/v1/videos/{ticket.id}/remix", {"prompt": "x"})
    assert gone.error == (409, "files of the video are missing; it cannot be made again", None)


def test_a_video_is_made_again_with_another_prompt(site: Site) -> None:
    first = site.new(num_videos=3, clips=[{"seed": 5}, {}, {"prompt": "c"}])
    site.finish(first, state=FAILED)
    site.queue.change(first, error={"code": "x", "message": "y"}, again=True, attempts=3)
    answer = site.post(f"/v1/videos/{first}/remix", {"prompt": "It turns."})
    ticket = site.ticket(answer.json["id"])
    assert (ticket.state, ticket.done, ticket.count, ticket.completed_at) == (QUEUED, 0, 3, None)
    assert (ticket.error, ticket.again, ticket.attempts) == (None, False, 0)
    assert ticket.settings["prompt"] == ticket.prompt == "It turns." and ticket.remixed_from == first
    assert scenes(site, ticket.id) == [{"cut": True, "seed": 5, "prompt": "It turns."}, {}, {"prompt": "It turns."}]
    assert not site.chains.folder(ticket.id).run.exists()
    assert site.post(f"/v1/videos/{first}/remix", {}).error == (400, "prompt is missing", "prompt")
    assert site.post("/v1/videos/x/remix", {"prompt": "x"}).status == 404


@pytest.mark.parametrize("video", [None, 5, {"id": 5}, {"id": "x", "more": 1}, {}, "[1]"])
def test_what_is_extended_is_a_file_or_an_id(video: Any, site: Site) -> None:
    status = site.post("/v1/videos/extensions", {"prompt": "x", "video": video}).status
    assert status == (404 if video == "[1]" else 400)


def test_an_id_may_be_written_in_any_way(site: Site) -> None:
    first = site.new()
    site.finish(first)
    for body in (
        {"video": {"id": first}},
        {"video": first},
        {"video": json.dumps({"id": first})},
        {"video[id]": first},
    ):
        empty = ("nothing", "", b"")
        answers = [site.post("/v1/videos/extensions", {"prompt": "x", **body}, *([empty] if "[" in str(body) else []))]
        assert [one.status for one in answers] == [200], answers
    both = site.post("/v1/videos/extensions", {"prompt": "x", "video": first}, FOOTAGE)
    assert both.error == (400, 'video must be a file, or {"id": …}', "video")
    more = site.post("/v1/videos/extensions", {"prompt": "x", "video": first, "sample_steps": 3})
    assert more.error == (400, "an extension takes no 'sample_steps': it keeps the video's settings", None)


def test_what_is_made_is_downloaded(site: Site) -> None:
    name = site.new(num_videos=2)
    early = site.ask(f"/v1/videos/{name}/content")
    assert early.error[:2] == (409, "the video is not completed, it is queued")
    for path in ("content", "preview", "report", "clips/1/content", "clips/1/thumbnail", "clips/1/seam/0"):
        assert site.ask(f"/v1/chains/{name}/{path}").status == 404, path
    site.finish(name)
    takes(site, name, 2, 2)
    (site.chains.folder(name).preview).write_bytes(b"a preview")
    for path, kind, data in (
        (f"/v1/videos/{name}/content", "video/mp4", b"the whole"),
        (f"/v1/videos/{name}/content?variant=thumbnail", "image/webp", b"a thumbnail"),
        (f"/v1/videos/{name}/content?variant=spritesheet", "image/jpeg", b"a spritesheet"),
        (f"/v1/chains/{name}/content", "video/mp4", b"the whole"),
        (f"/v1/chains/{name}/preview", "image/webp", b"a preview"),
        (f"/v1/chains/{name}/report", "text/html; charset=utf-8", b"<p>the report"),
        (f"/v1/chains/{name}/clips/2/content", "video/mp4", b"2.mp4"),
        (f"/v1/chains/{name}/clips/2/content?take=2", "video/mp4", b"take 2"),
        (f"/v1/chains/{name}/clips/2/thumbnail", "image/webp", b"a thumbnail"),
        (f"/v1/chains/{name}/clips/2/thumbnail?take=1", "image/webp", b"a thumbnail"),
    ):
        answer = site.ask(path)
        assert (answer.status, answer.headers["content-type"], answer.data) == (200, kind, data), path
    assert site.ask(f"/v1/videos/{name}/content").headers["content-disposition"] == f'inline; filename="{name}.mp4"'
    assert site.ask(f"/v1/chains/{name}/report").headers["content-security-policy"].startswith("sandbox;")
    for path in ("clips/3/content", "clips/2/content?take=3", "clips/1/content?take=1"):
        assert site.ask(f"/v1/chains/{name}/{path}").error == (404, "there is no such clip", None)
    site.chains.folder(name).joined.unlink()
    assert site.ask(f"/v1/videos/{name}/content").error == (404, "there is no such video", None)


def test_a_seam_is_seen_frame_by_frame(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name = site.new()
    monkeypatch.setattr(
        "wan.server.folders.ChainFolder.seam", lambda self, number: [b"%d %d" % (number, at) for at in (0, 1)]
    )
    for frame in (0, 1):
        answer = site.ask(f"/v1/chains/{name}/clips/3/seam/{frame}")
        assert (answer.headers["content-type"], answer.data) == ("image/jpeg", b"3 %d" % frame)
    for frame in (-1, 2):
        assert site.ask(f"/v1/chains/{name}/clips/3/seam/{frame}").error == (404, "there is no such picture", None)


def test_a_picture_is_made_again_when_its_video_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, made = tmp_path / "a.mp4", list[Any]()
    video.touch()

    async def decode(what: str, file: Path, picture: Path) -> None:
        made.append((what, file, picture.name))
        picture.write_bytes(b"x")

    monkeypatch.setattr(videos, "decode", decode)

    def picture(at: int | None = None) -> int:
        path = asyncio.run(videos.picture_of(video, "thumbnail", "webp"))
        assert path == tmp_path / ".a.thumbnail.webp" and not list(tmp_path.glob("*.part"))
        if at is not None:
            os.utime(path, ns=(at, at))
        return len(made)

    os.utime(video, ns=(5000, 5000))
    assert picture(5000) == 1 and picture(4999) == 1 and picture() == 2 and picture() == 2
    assert made[0] == ("thumbnail", video, ".a.thumbnail.webp.part")


def test_how_far_a_chain_is_is_told_while_it_is_made(site: Site) -> None:
    name = site.new(num_videos=4)
    live = making(site, name, clip=2)
    site.queue.change(name, done=1)
    for event, values in (
        ("stage", {"stage": "sample", "step": 0}),
        ("step", {"step": 5, "steps": 10}),
        ("warning", {"message": "m"}),
    ):
        live.hear(event, values)
    chain = site.ask(f"/v1/chains/{name}").json
    left = chain["now"].pop("seconds_left")
    assert chain["now"] == {"clip": 2, "stage": "sample", "step": 5, "steps": 10} and left >= 0
    assert (chain["progress"], chain["warnings"]) == (37, ["m"])
    live.hear("clip_started", {"clip": 1})  # again
    live.hear("step", {"step": 5, "steps": 10})
    assert site.ask(f"/v1/chains/{name}").json["progress"] == 25
    site.queue.change(name, state=PAUSED)
    chain = site.ask(f"/v1/chains/{name}").json
    assert chain["now"] is None and (chain["progress"], chain["warnings"]) == (25, ["m"])


def test_a_finished_clip_is_told_with_its_facts(site: Site) -> None:
    name = site.new(num_videos=2, clips=[{}, {"seed": 5}])
    site.finish(name)
    chain = site.ask(f"/v1/chains/{name}").json
    assert chain["drift"] == {"colour": [0.0]}
    version = (site.chains.folder(name).run / "video_2.mp4").stat().st_mtime_ns
    assert chain["clips"][1] == clip(2, {"seed": 5}, finished=True, version=version, prompt="p2", seed=102)


def test_who_listens_hears_first_how_things_are(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name = site.new()
    audience = site.supervisor.audience
    audience.tell(name, "stage", stage="load")
    audience.tell(name, "step", step=1)

    def speak() -> None:
        audience.tell(name, "clip_finished", clip=1, seam=None)
        audience.close()

    def events(answer: Answer) -> list[tuple[str, str | None, Any]]:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = [
            dict(line.split(": ", 1) for line in part.splitlines())
            for part in answer.data.decode().split("\r\n\r\n")
            if part
        ]
        return [(one["event"], one.get("id"), json.loads(one["data"])) for one in parts]

    first, finished = events(site.ask(f"/v1/chains/{name}/events", meanwhile=speak))
    assert first[0] == "state" and first[2]["id"] == name and "clips" not in first[2]
    assert finished == ("clip_finished", "3", {"clip": 1, "seam": None})
    audience.tell(name, "stage", stage="load")
    audience.tell(name, "step", step=1)
    back = events(site.ask(f"/v1/chains/{name}/events", meanwhile=audience.close, last_event_id="4"))
    assert [one[:2] for one in back] == [("state", None), ("step", "5")]
    audience.tell(name, "stage", stage="load")
    lost = events(site.ask(f"/v1/chains/{name}/events", meanwhile=audience.close, last_event_id="x"))
    assert [one[0] for one in lost] == ["state"]
    assert site.ask("/v1/chains/x/events").status == 404 and chain_routes._PING == 15


def test_a_plan_is_told_line_by_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name = site.new()

    async def plan_of(owner: Any, order: Any) -> list[str]:
        assert owner == site.owner and order == site.chains.order_of(site.ticket(name))
        return ["one", "two"]

    monkeypatch.setattr(chains, "plan_of", plan_of)
    assert site.ask(f"/v1/chains/{name}/plan").json == {"lines": ["one", "two"]}


# --- the app


def test_health_and_numbers_tell_what_goes_on(site: Site) -> None:
    names = [site.new() for _ in range(3)]
    site.supervisor.state = "busy"
    assert site.ask("/health").json == {"status": "ok", "worker": "busy", "queued": 3}
    making(site, names[0])
    site.post("/v1/chains", [1])

    def number(name: str) -> str:
        return next(line.split()[-1] for line in text.splitlines() if line.startswith(name))

    answer = site.ask("/metrics")
    text = answer.data.decode()
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert number('wan_chains{state="queued"}') == "2.0" and number('wan_chains{state="in_progress"}') == "1.0"
    assert number("wan_worker_busy") == "1.0"
    assert number('wan_requests_total{method="POST",status="2xx"}') == "3.0"
    assert number('wan_requests_total{method="POST",status="4xx"}') == "1.0"
    assert number('wan_requests_total{method="GET",status="2xx"}') == "1.0"
    assert number('wan_request_seconds_count{method="POST"}') == "4.0"
    assert 0 < float(number('wan_request_seconds_sum{method="POST"}')) < 60
    site.supervisor.making = None
    text = site.ask("/metrics").data.decode()
    assert number("wan_worker_busy") == "0.0"


def test_every_error_has_openai_s_body_and_none_tells_a_path(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Answer:
        def get(name: str) -> Any:
            raise error

        monkeypatch.setattr(site.chains, "get", get)
        try:
            return site.ask("/v1/chains/x")
        except type(error):  # the server's own error handler raises it again for its log
            return answered[-1]

    answered = list[Answer]()
    nowhere = site.ask("/v1/nothing")
    assert nowhere.json == {
        "error": {"message": "Not Found", "type": "invalid_request_error", "param": None, "code": "not_found"}
    }
    method = site.ask("/v1/chains", "PUT", {})
    assert (method.status, method.json["error"]["code"]) == (405, None)
    full = fail(OSError(28, "No space left on device", "/data/x"))
    assert (full.status, full.json["error"]) == (
        507,
        {
            "message": "the server cannot store that: No space left on device",
            "type": "server_error",
            "param": None,
            "code": "storage",
        },
    )
    wrong = fail(ApiError("cannot read /data/x.mp4", status=418, param="p", code="c", headers={"X-Is": "so"}))
    assert wrong.status == 418 and wrong.headers["x-is"] == "so"
    assert wrong.json["error"] == {
        "message": "cannot read x.mp4",
        "type": "invalid_request_error",
        "param": "p",
        "code": "c",
    }


def test_a_bug_is_told_without_its_words(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str) -> Any:
        raise KeyError("a secret")

    monkeypatch.setattr(site.chains, "get", get)
    sent = list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/chains/x",
        "query_string": b"",
        "headers": [],
        "root_path": "",
    }

    async def ask() -> None:
        await site.app(scope, receive, send)

    with pytest.raises(KeyError):  # which goes to the log
        asyncio.run(ask())
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"] == {
        "message": "the server has an error, which its log tells",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_the_app_keeps_a_worker_at_work_as_long_as_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[Any]()

    class Supervisor:
        def __init__(self, *words: Any) -> None:
            done.append(words)
            self.audience = SimpleNamespace(close=lambda: done.append("audience"))

        def wake(self) -> None:
            done.append("wake")

        async def run(self) -> None:
            await forever("run")

    async def forever(what: Any) -> Any:
        done.append("begin")
        try:
            await asyncio.sleep(60)
        finally:
            done.append("end")

    site = Site(tmp_path, monkeypatch, sample_steps=7)
    monkeypatch.setattr(app, "Supervisor", Supervisor)
    monkeypatch.setattr(chain_routes, "watch_previews", forever)
    monkeypatch.setattr(site.chains, "drop_old_drafts", lambda: forever("drafts"))

    async def live() -> None:
        words = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> Any:
            await asyncio.sleep(0.01)
            return words.pop(0)

        async def send(message: Any) -> None:
            done.append(message["type"])

        await site.app({"type": "lifespan"}, receive, send)

    asyncio.run(live())
    words = done.pop(0)
    assert words[2] == {"ckpt_dir": "x", "output_dir": str(tmp_path), "sample_steps": 7} and words[5:] == (
        WORKER,
        1,
    )
    assert done == [
        *("wake", "lifespan.startup.complete", "begin", "begin", "begin"),
        *("audience", "end", "end", "end", "lifespan.shutdown.complete"),
    ]
    with pytest.raises(Exception, match="closed"):
        site.queue.counts()


def test_the_app_says_its_version_and_loads_nothing_of_others(site: Site) -> None:
    assert site.ask("/openapi.json").json["info"] == {"title": "wan-continue", "version": wan.__version__}
    body = site.ask("/openapi.json").json["paths"]["/v1/videos/extensions"]["post"]["requestBody"]["content"]
    schema = body["multipart/form-data"]["schema"]
    assert schema["required"] == ["prompt", "video"] and schema["properties"]["video"]["format"] == "binary"
    assert set(body) == {"multipart/form-data", "application/json"}
    for path in ("/docs", "/redoc"):
        assert site.ask(path).status == 404


def test_its_folders_are_for_nobody_else(site: Site) -> None:
    assert (site.folder / "jobs").stat().st_mode & 0o777 == 0o700
    assert site.chains.folder(site.new()).path.stat().st_mode & 0o777 == 0o700


# --- pages


def test_the_page_shows_chains_runs_and_settings(site: Site) -> None:
    name = site.new(num_videos=2, prompt="A <b>boat</b>.")
    site.new(start=False, prompt="Not yet.")
    for run, files in (
        ("by hand", ("report.html", "run.json")),
        (".hidden", ("report.html", "run.json")),
        ("half", ("run.json",)),
    ):
        (site.folder / run).mkdir()
        for file in files:
            (site.folder / run / file).write_text("{}", encoding="utf-8")
    page = site.ask("/")
    text = page.data.decode()
    assert page.headers["content-type"].startswith("text/html") and f'href="/chains/{name}"' in text
    assert "A &lt;b&gt;boat&lt;/b&gt;." in text and "Not yet." not in text and "0 of 2 clips" in text
    assert re.findall(r'href="/old/([^"]*)"', text) == ["by%20hand"] and site.ask("/parts/queue").status == 200
    assert 'id="s_sample_steps"' in text and 'id="s_take"' not in text and 'id="s_prompt"' not in text
    assert site.ask(f"/chains/{name}").status == 200 and site.ask("/chains/x").status == 404
    page = site.ask("/static/app.js")
    assert (page.status, page.headers["content-type"].partition(";")[0]) == (200, "text/javascript")
    assert site.ask("/static/app.css").headers["content-type"].startswith("text/css")
    assert site.ask("/static/app.py").error == (404, "there is no such file", None)


def test_a_run_of_the_commands_is_looked_at(site: Site) -> None:
    run = site.folder / "by hand"
    run.mkdir()
    clips = [
        {"number": number, "file": f"video_{number}.mp4", "prompt": f"p{number}", "seam": None} for number in (1, 2)
    ]
    (run / "report.json").write_text(json.dumps({"clips": clips}), encoding="utf-8")
    for file in ("report.html", "run.json", "video_2.mp4"):
        (run / file).write_text(file, encoding="utf-8")
    page = site.ask("/old/by hand").data.decode()
    assert "<h1>by hand</h1>" in page and "p1" in page and "/old/by%20hand/content?clip=2" in page
    report = site.ask("/old/by hand/report")
    assert report.data == b"report.html" and report.headers["content-type"] == "text/html; charset=utf-8"
    assert site.ask("/old/by hand/content").error == (404, "there is no such clip", None)
    assert site.ask("/old/by hand/content?clip=1").status == 404
    assert site.ask("/old/by hand/content?clip=2").data == b"video_2.mp4"
    (run / "joined.mp4").write_bytes(b"the whole")
    whole = site.ask("/old/by hand/content")
    assert (whole.data, whole.headers["content-type"]) == (b"the whole", "video/mp4")
    for path in ("/old/x", "/old/x/report", "/old/x/content", "/old/jobs"):
        assert site.ask(path).status == 404


def test_a_part_of_a_page_is_made_again_when_it_is_another(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made, get_template = list[str](), page_routes._templates().get_template

    def counted(template: str, *more: Any) -> Any:
        made.extend([] if more else [template])  # not those that it includes
        return get_template(template, *more)

    monkeypatch.setattr(page_routes._templates(), "get_template", counted)
    monkeypatch.setattr(page_routes, "_PARTS", 2)
    names = [site.new() for _ in range(3)]

    def part(name: str) -> int:
        made.clear()
        assert f"/v1/chains/{name}" in site.ask(f"/parts/chains/{name}").data.decode()
        return len(made)

    assert (part(names[0]), part(names[0])) == (1, 0)
    site.finish(names[0])
    assert (part(names[0]), part(names[0])) == (1, 0)
    live = making(site, names[0])
    assert (part(names[0]), part(names[0])) == (1, 0)
    for event, values in (("warning", {"message": "m"}), ("clip_started", {"clip": 2})):
        live.hear(event, values)
        assert (part(names[0]), part(names[0])) == (1, 0)
    assert [part(name) for name in (names[1], names[0], names[2])] == [1, 0, 1]
    assert [part(name) for name in (names[1], names[2], names[0])] == [0, 0, 1]  # two are kept


def test_a_browser_enters_with_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "a-key-of-some-length"
    site = Site(tmp_path, monkeypatch, key=key)
    page = site.ask("/login")
    assert page.status == 200 and b"That is not the key." not in page.data
    for wrong in ({"key": "x"}, {}):
        answer = site.post("/login", wrong)
        assert answer.status == 401 and b"That is not the key." in answer.data and "set-cookie" not in answer.headers
    answer = site.post("/login", {"key": key})
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert (
        "HttpOnly" in cookie and "SameSite=strict" in cookie and "Max-Age=2592000" in cookie and "Secure" not in cookie
    )
    assert site.ask("/", cookie=cookie.partition(";")[0]).status == 200 and site.ask("/").status == 303
    token = re.search(r"[0-9a-f]{64}", site.ask("/", cookie=cookie.partition(";")[0]).data.decode())
    assert token is not None
    allowed: Any = {"cookie": cookie.partition(";")[0], "x_wan_token": token[0]}
    assert site.ask("/v1/chains", "POST", {"prompt": "x"}, **allowed).status == 201
    without = Site(tmp_path / "b", monkeypatch)
    assert without.ask("/login").headers["location"] == "/" and without.post("/login", {"key": key}).status == 401


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.04, "0.0 s"), (119.9, "119.9 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_a_length_of_time_is_told_in_words(seconds: float | None, text: str) -> None:
    assert page_routes.span(seconds) == text


def test_each_setting_has_a_field_that_fits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, sample_steps=7)
    groups = page_routes.fields(site.chains)
    rows = {row["name"]: row for group in groups for row in group["rows"]}
    assert all(group["rows"] for group in groups) and len({group["name"] for group in groups}) == len(groups) > 2
    assert {"prompt", "num_videos", "take", "prompt_for"} & rows.keys() == set()
    kinds = {
        name: (rows[name]["kind"], rows[name]["default"]) for name in ("size", "sample_steps", "include_source", "from")
    }
    assert kinds == {
        "size": ("select", "the task's first size"),
        "sample_steps": ("text", "7"),
        "include_source": ("switch", "off"),
        "from": ("text", "its end"),
    }
    assert rows["size"]["choices"] == ["1280x704", "704x1280"] and rows["sample_steps"]["choices"] == []
    assert rows["guidance_interval"]["metavar"] == "LOW HIGH" and rows["sample_steps"]["label"] == "sample steps"
    assert rows["sample_solver"]["kind"] == "select" and "unipc" in rows["sample_solver"]["choices"]
    assert rows["custom_prompt"]["kind"] == "text" and not any("`" in row["help"] for row in rows.values())


# --- bodies


def test_a_form_is_read_part_by_part(site: Site) -> None:
    kind: Any = {"content_type": "Multipart/Form-Data; boundary=edge-of-a-part"}
    body, _ = form({"prompt": "x", "sample_steps": "4"})
    answer = site.ask("/v1/chains", "POST", body, **kind)
    assert answer.status == 201 and answer.json["settings"]["sample_steps"] == 4
    for body in (b"no form", b"--edge-of-a-part\r\nno header\r\n"):
        status, message, _ = site.ask("/v1/chains", "POST", body, **kind).error
        assert status == 400 and message.startswith("the form cannot be read: ")
    too_many: list[tuple[dict[str, Any], list[Any]]] = [
        ({f"a{number}": "x" for number in range(1001)}, []),
        ({}, [("pictures", f"{number}.png", PICTURE) for number in range(61)]),
        ({"prompt": "x" * ((1 << 20) + 1)}, []),
    ]
    for fields, files in too_many:
        status, message, _ = site.ask("/v1/chains", "POST", form(fields, files)[0], **kind).error
        assert status == 400 and message.startswith("the form cannot be read: "), message
    assert site.ask("/v1/chains", "POST", form({"prompt": "x" * (1 << 20)})[0], **kind).error[2] == "prompt"
    assert list((site.folder / "jobs").iterdir()) == [site.chains.folder(answer.json["id"]).path]


def test_a_client_that_leaves_in_the_middle_gets_no_answer_that_is_one(site: Site) -> None:
    sent = list[Any]()
    coming = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def ask() -> None:
        async def receive() -> Any:
            return coming.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chains", "query_string": b"", "headers": []}
        await site.app({**scope, "root_path": ""}, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 499 and list((site.folder / "jobs").iterdir()) == []


def test_a_seed_that_is_chosen_stays(site: Site) -> None:
    assert site.ticket(site.new(base_seed=7)).settings["base_seed"] == 7
    assert site.ticket(site.new(base_seed=0)).settings["base_seed"] == 0
    assert site.ticket(site.new(base_seed=-1)).settings["base_seed"] >= 0


def test_a_request_without_a_body_asks_for_nothing(site: Site) -> None:
    name = site.new()
    site.finish(name)
    for body in (None, b"", b"  \n"):
        assert site.ask(f"/v1/chains/{name}/clips/1/redo", "POST", body).status == 200
    assert site.ask("/v1/chains", "POST", None).error[1] == "a video from text alone needs a prompt"


def test_the_model_may_have_any_of_its_names(site: Site) -> None:
    for model, told in (("v2v-5B", "v2v-5B"), ("", "wan2.2-ti2v-5b"), (None, "wan2.2-ti2v-5b")):
        assert site.ticket(site.new(model=model)).model == told
    assert site.post("/v1/chains", {"prompt": "x", "model": 5}).error == (400, "model must be text", "model")


def test_the_length_of_a_chain_is_the_longest_that_is_asked_for(site: Site) -> None:
    for fields, count in (
        ({}, 1),
        ({"num_videos": 3}, 3),
        ({"clips": [{}, {}]}, 2),
        ({"num_videos": 1, "clips": [{}, {}]}, 1),
        ({"seconds": 7, "num_videos": 9}, 3),  # 81 frames of a still, then 80 a clip
        ({"seconds": 0.1, "clips": [{}, {}]}, 2),
    ):
        assert site.ticket(site.new(**fields)).count == count, fields
