"""`/v1/chains`: a chain that is led, seen, changed and removed while it is made."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request

import pytest

from tests.support.served import SHAPES, Served

pytestmark = pytest.mark.slow


def new_chain(quick: Served, **fields: object) -> str:
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    status, chain = quick.send("/v1/chains", form, [("video", "shapes.mp4", SHAPES.read_bytes())])
    assert status == 201, chain
    return str(chain["id"])


def listen(quick: Served, name: str, events: list[tuple[str, dict[str, object]]]) -> threading.Thread:
    """Collect the events of a chain on a thread until its state is an end."""
    answer = urllib.request.urlopen(f"{quick.url}/v1/chains/{name}/events", timeout=120)

    def read() -> None:
        event = ""
        with answer:
            for line in answer:
                key, _, value = line.decode().strip().partition(": ")
                if key == "event":
                    event = value
                elif key == "data":
                    events.append((event, json.loads(value)))
                    if event == "state" and (events[-1][1].get("state") or events[-1][1].get("status")) == "completed":
                        return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_a_chain_is_planned_started_watched_and_changed(quick: Served) -> None:
    clips = [{"prompt": "A green circle moves left."}, {"name": "stop", "takes": 2}]
    name = new_chain(quick, start="false", num_videos="2", base_seed="7", clips=clips, prompt="It goes on.")
    assert quick.ask(f"/v1/videos/{name}")[0] == 404  # nobody has started it
    lines = quick.ask(f"/v1/chains/{name}/plan")[1]["lines"]
    assert lines[0].startswith("2 clips of 160x96 at 8 frames per second") and str(quick.folder) not in str(lines)
    assert any("GPU memory" in line for line in lines) and any("of sampling" in line for line in lines)
    events: list[tuple[str, dict[str, object]]] = []
    thread = listen(quick, name, events)
    assert quick.ask(f"/v1/chains/{name}/start", "POST")[1]["status"] == "queued"
    chain = quick.wait(name, "completed")
    thread.join(10)
    assert not thread.is_alive()
    kinds = [event for event, _ in events]
    assert {"state", "clip_started", "stage", "step", "prompt", "preview", "clip_finished"} <= set(kinds)
    assert [told["clip"] for event, told in events if event == "clip_finished"] == [1, 2]
    assert {told["stage"] for event, told in events if event == "stage"} >= {"sample", "write"}
    assert [clip["takes"] for clip in chain["clips"]] == [[], [1, 2]] and chain["clips"][1]["said"]["name"] == "stop"
    assert all(isinstance(clip["seam"]["score"], float) for clip in chain["clips"]) and chain["drift"]["colour"]
    for path, kind in (
        ("seam/0", "image/jpeg"),
        ("seam/7", "image/jpeg"),
        ("thumbnail", "image/webp"),
        ("content", "video/mp4"),
        ("content?take=2", "video/mp4"),
    ):
        status, data, headers = quick.fetch(f"/v1/chains/{name}/clips/2/{path}")
        assert status == 200 and data and headers["content-type"] == kind
    assert quick.fetch(f"/v1/chains/{name}/clips/2/seam/8")[0] == 404
    assert quick.fetch(f"/v1/chains/{name}/content", headers={"Range": "bytes=0-9"})[0] == 206  # a player seeks

    first, second = (clip["seed"] for clip in chain["clips"])
    kept = 2 if second == chain["clips"][1]["candidates"][0]["seed"] else 1
    assert quick.ask(f"/v1/chains/{name}/clips/2/take", "POST", {"take": 3})[0] == 400
    quick.ask(f"/v1/chains/{name}/clips/2/take", "POST", {"take": kept})
    chain = quick.wait(name, "completed")
    assert (
        chain["clips"][1]["seed"] == chain["clips"][1]["candidates"][kept - 1]["seed"]
        if chain["clips"][1]["candidates"]
        else True
    )
    assert chain["clips"][1]["seed"] != second and chain["clips"][0]["seed"] == first

    status, chain = quick.ask(f"/v1/chains/{name}/clips/1/redo", "POST", {})
    assert (status, chain["status"], chain["clips_finished"]) == (200, "queued", 0)
    chain = quick.wait(name, "completed")
    assert chain["clips"][0]["seed"] != first
    status, chain = quick.ask(
        f"/v1/chains/{name}", "PATCH", {"num_videos": 3, "clips": {"2": {"takes": None}, "3": {"prompt": "It ends."}}}
    )
    assert status == 200, chain
    chain = quick.wait(name, "completed")
    assert [clip["finished"] for clip in chain["clips"]] == [True] * 3 and chain["clips"][2]["prompt"].endswith(
        "It ends."
    )


def test_a_chain_rests_goes_on_and_is_removed_while_it_is_made(quick: Served) -> None:
    name = new_chain(quick, num_videos="4", prompt="On.", sample_steps="60")
    late = new_chain(quick, num_videos="1", prompt="On.")
    events: list[tuple[str, dict[str, object]]] = []
    listen(quick, name, events)
    quick.wait(name, "in_progress")
    assert quick.ask(f"/v1/chains/{late}/pause", "POST")[1]["status"] == "paused"
    quick.ask(f"/v1/chains/{name}/pause", "POST")
    chain = quick.wait(name, "paused")
    made = chain["clips_finished"]
    assert 1 <= made < 4 and chain["clips"][made]["finished"] is False
    assert quick.ask(f"/v1/videos/{name}")[1]["status"] == "in_progress"
    assert quick.ask(f"/v1/chains/{name}/resume", "POST")[1]["status"] == "queued"
    quick.wait(name, "in_progress")
    assert quick.ask(f"/v1/chains/{name}", "DELETE") == (200, {"id": name, "object": "chain.deleted", "deleted": True})
    assert quick.ask(f"/v1/chains/{name}")[0] == 404 and not list((quick.folder / "jobs").glob(f"*{name}"))
    assert quick.ask(f"/v1/chains/{late}/resume", "POST")[0] == 200  # the worker is there for the next one
    assert quick.wait(late, "completed")["clips"][0]["finished"]


def test_a_clip_ahead_is_changed_while_one_before_it_is_made(quick: Served) -> None:
    name = new_chain(quick, num_videos="2", prompt="On.", sample_steps="60")
    quick.wait(name, "in_progress")
    status, _ = quick.ask(f"/v1/chains/{name}/clips/2", "PATCH", {"prompt": "A red square."})
    assert status == 200
    chain = quick.wait(name, "completed")
    assert chain["clips"][1]["prompt"].endswith("A red square.")
    report = quick.fetch(f"/v1/chains/{name}/report")
    assert report[0] == 200 and report[2]["content-security-policy"].startswith("sandbox;")


def test_a_run_of_the_command_line_is_shown_and_not_changed(quick: Served) -> None:
    made = next(path.parent for path in (quick.folder / "jobs").glob("*/run/joined.mp4"))
    shutil.copytree(made, quick.folder / "by hand")
    assert 'href="/old/by%20hand"' in quick.ask("/")[1]
    assert "Clip 1" in quick.ask("/old/by%20hand")[1] and quick.fetch("/old/by%20hand/report")[0] == 200
    assert quick.fetch("/old/by%20hand/content")[2]["content-type"] == "video/mp4"
    for path in (
        "/old/..",
        "/old/jobs",
        "/old/%2e%2e/content",
        "/old/.uploads",
        "/static/..%2f..%2fapp.py",
        "/chains/x",
    ):
        assert quick.fetch(path)[0] == 404, path


def test_what_a_chain_may_not_be_is_refused(quick: Served) -> None:
    asked = [
        ({"clips": [{"lora": "/etc/passwd"}], "prompt": "x"}, "clip 1: 'lora' is nothing that a clip has"),
        ({"clips": [{"cut": "/etc/passwd"}], "prompt": "x"}, "clip 1: no picture 'passwd' came with this"),
        ({"clips": {"prompt": "x"}}, "clips must be a JSON list"),
        ({"settings": {"ckpt_dir": "/"}, "prompt": "x"}, "'ckpt_dir' is no setting that a client may choose"),
        ({"settings": {"takes": 2, "best_of": 2}, "prompt": "x"}, "takes chooses as best_of does"),
        ({"prompt": "x", "num_videos": 20000}, "must be at most 10000"),
    ]
    for body, message in asked:
        status, answer = quick.ask("/v1/chains", "POST", body)
        assert status == 400 and message in answer["error"]["message"], answer
    status, answer = quick.send("/v1/chains", {"prompt": "x"}, [("pictures", "a.png", SHAPES.read_bytes())])
    assert (status, answer["error"]["message"]) == (400, "'a.png' is no picture")
    assert not list((quick.folder / "jobs").glob(".*"))


def test_health_metrics_models_and_the_openapi_page(quick: Served) -> None:
    assert quick.ask("/health")[1]["status"] == "ok"
    assert quick.ask("/v1/models")[1]["data"][0]["id"] == "wan2.2-ti2v-5b"
    paths = quick.ask("/openapi.json")[1]["paths"]
    assert {"/v1/videos", "/v1/videos/extensions", "/v1/chains/{name}/events"} <= set(paths)
    text = quick.ask("/metrics")[1]
    assert 'wan_chains{state="queued"}' in text and "wan_request_seconds_bucket" in text


def test_a_clip_s_anchor_is_sent_from_the_page_where_the_model_has_one() -> None:
    from wan.server.orders import read_clip
    from wan.server.page_routes import _templates

    clip = {"number": 1, "said": {}, "finished": False}
    chain = {"id": "x", "prompt": None, "now": None, "error": None, "warnings": [], "clips": [clip]}
    template = _templates().get_template("clips.html.jinja")
    shown = {anchors: template.render(chain=chain, joined=None, drift=[], anchors=anchors) for anchors in (True, False)}
    assert 'data-picture="anchor"' in shown[True] and 'data-picture="anchor"' not in shown[False]
    assert 'data-picture="end_image"' in shown[False]
    assert read_clip({"anchor": "face.png"}, {"face.png": "picture_1.png"}, 1) == {"anchor": "picture_1.png"}
