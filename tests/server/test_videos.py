"""`/v1/videos`, with the official client as it comes from the index."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.support.commands import frames_in
from tests.support.golden import ROOT
from tests.support.served import SHAPES, Served

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]


@pytest.fixture(scope="module")
def client(server: Served) -> Any:  # its types know OpenAI's own lengths and sizes
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_the_official_client_makes_extends_downloads_lists_and_deletes(
    server: Served, client: Any, tmp_path: Path
) -> None:
    made = client.videos.create(
        prompt="A green circle moves left.",
        model="wan2.2-ti2v-5b",
        input_reference=SHAPES,
        seconds="1",
    )
    assert (made.object, made.status, made.seconds, made.progress) == ("video", "queued", "1", 0)  # two clips of 0.5 s
    with pytest.raises(openai.ConflictError) as early:
        client.with_options(max_retries=0).videos.download_content(made.id)
    assert early.value.code == "video_not_ready"
    done = client.videos.poll(made.id, poll_interval_ms=100)
    assert (done.status, done.progress, done.error, done.size) == ("completed", 100, None, "160x96")
    assert done.completed_at is not None and done.completed_at >= done.created_at
    longer = client.videos.extend(
        prompt="It stops.",
        seconds="0.5",
        video=openai.omit,
        extra_body={"video": {"id": made.id}},
    )
    assert longer.seconds == "1.5"  # of both
    longer = client.videos.poll(longer.id, poll_interval_ms=100)
    assert longer.status == "completed"
    for one, frames in ((made, 9), (longer, 13)):  # the first is the last of the source
        client.videos.download_content(one.id).write_to_file(tmp_path / "a.mp4")
        assert frames_in(tmp_path / "a.mp4") == frames
    clips = server.ask(f"/v1/chains/{longer.id}")[1]["clips"]
    assert [clip["prompt"] for clip in clips] == ["A green circle moves left."] * 2 + ["It stops."]
    # it goes on from the frames themselves: the first two clips are the files of the video before
    for number in (1, 2):
        downloads = [
            next((server.folder / "jobs" / name / "run").glob(f"video_0{number}_*.safetensors"))
            for name in (made.id, longer.id)
        ]
        assert downloads[0].samefile(downloads[1])
    picture = client.videos.download_content(longer.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(picture)).format == "WEBP"
    sheet = client.videos.download_content(longer.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(sheet)).size == (5 * 160, 4 * 96)
    again = client.videos.poll(client.videos.remix(longer.id, prompt="It turns.").id, poll_interval_ms=100)
    assert (again.status, again.remixed_from_video_id) == ("completed", longer.id)
    clips = server.ask(f"/v1/chains/{again.id}")[1]["clips"]
    assert [clip["prompt"] for clip in clips][1:] == [
        "A green circle moves left.",
        "It turns.",
    ]  # what it extended stays
    ids = [one.id for one in client.videos.list(limit=2, order="asc")]  # which asks for the next pages itself
    assert [one for one in ids if one in (made.id, longer.id, again.id)] == [made.id, longer.id, again.id]
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    assert not (server.folder / "jobs" / made.id).exists()
    assert client.videos.download_content(longer.id).read()  # it needs nothing of the one before


def test_videos_from_text_from_a_picture_and_of_a_file(server: Served, client: Any, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (320, 192), "red").save(picture, "PNG")
    text = client.videos.create(prompt="A blue circle.", size="160x96")
    still = client.videos.create(prompt="It grows.", input_reference=("a.png", picture.getvalue()))
    whole = client.videos.extend(prompt="On.", seconds="0.5", video=SHAPES)
    for one, frames in ((text, 5), (still, 5)):
        assert client.videos.poll(one.id, poll_interval_ms=100).status == "completed"
        client.videos.download_content(one.id).write_to_file(tmp_path / "a.mp4")
        assert frames_in(tmp_path / "a.mp4") == frames
    assert client.videos.poll(whole.id, poll_interval_ms=100).status == "completed"
    client.videos.download_content(whole.id).write_to_file(tmp_path / "a.mp4")
    assert frames_in(tmp_path / "a.mp4") > frames_in(SHAPES)  # the source, and what is new


def test_what_cannot_be_is_refused_in_openai_s_words(server: Served, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="x", model="sora-2")
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "model",
        "model_not_found",
        "invalid_request_error",
    )
    asked = [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": "x", "size": "1x1"}, "size", "size must be one of 160x96; 1x1 is not"),
        ({"prompt": "x", "seconds": "-1"}, "seconds", "seconds must be a positive number"),
        ({"prompt": "x", "seconds": "99999"}, "seconds", "more than the 20000 that this server makes of one chain"),
        ({"prompt": "x", "vlm_path": "/etc"}, "vlm_path", "'vlm_path' is no setting that a client may choose"),
        ({"prompt": "x", "nonsense": 1}, "nonsense", "'nonsense' is no setting"),
        ({"prompt": "x", "sample_steps": 0}, "sample_steps", "sample_steps must be at least 1, 0 is not"),
        (
            {"prompt": "x", "input_reference": {"image_url": "http://a/b.png"}},
            "input_reference",
            "this server fetches nothing",
        ),
    ]
    for body, param, message in asked:
        status, answer = server.ask("/v1/videos", "POST", body)
        assert (status, answer["error"]["param"]) == (400, param) and message in answer["error"]["message"], answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    status, answer = server.send("/v1/videos", {"prompt": "x"}, [("input_reference", "a.mp4", b"no video")])
    assert status == 400 and answer["error"]["message"] == "the file is neither a video nor a picture that can be read"
    status, answer = server.ask("/v1/videos/extensions", "POST", {"prompt": "x", "video": {"id": "video_0"}})
    assert status == 404
    assert server.ask("/v1/videos", "POST", [1])[0] == 400 and server.ask("/v1/videos?limit=0")[0] == 400
    assert not list((server.folder / "jobs").glob(".*"))  # what was refused leaves nothing


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_of_the_page_for_programs_do_what_it_says(quick: Served, tmp_path: Path) -> None:
    shutil.copy(SHAPES, tmp_path / "input.mp4")
    Image.new("RGB", (320, 192), "navy").save(tmp_path / "night.png")
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\n(curl .*?)^```$", text, re.MULTILINE | re.DOTALL)
    create, extend, download, chain, events = "".join(blocks).splitlines()

    def run(line: str, name: str = "", *more: str) -> str:
        words = shlex.split(line.replace("http://127.0.0.1:8188", quick.url).replace("video_…", name))
        done = subprocess.run([*words, *more, "-sS", "--fail-with-body"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    first = json.loads(run(create.replace("seconds=10", "seconds=0.5")))["id"]
    quick.wait(first, "completed")
    longer = json.loads(run(extend.replace('"5"', '"0.5"'), first))
    quick.wait(longer["id"], "completed")
    run(download, longer["id"])
    assert longer["status"] == "queued" and frames_in(tmp_path / "out.mp4") == 9
    made = json.loads(run(chain))
    assert [clip["said"].get("takes") for clip in made["clips"]] == [None, 3, None]
    quick.wait(made["id"], "completed")
    last = quick.ask(f"/v1/chains/{made['id']}")[1]["clips"]
    assert [len(clip["takes"]) for clip in last] == [0, 3, 0] and last[2]["said"]["cut"].startswith("picture_")
    assert last[1]["prompt"].endswith("It rains")
    with pytest.raises(subprocess.TimeoutExpired) as watched:  # it streams until the client goes
        subprocess.run(
            shlex.split(events.replace("http://127.0.0.1:8188", quick.url).replace("video_…", made["id"])),
            capture_output=True,
            timeout=1,
        )
    assert b"event: state" in (watched.value.stdout or b"")
