"""What an endpoint is sent stays with it, and what it answers may be anything."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import Seen, metadata
from wan import prompting
from wan.captioner import EndpointCaptioner, endpoint, open_captioner
from wan.errors import UserError
from wan.public import public_path, public_url

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
ANSWER = json.dumps({"choices": [{"message": {"content": "A cat."}}]}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.server.answer(self)

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Not in the test output."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    asked: list[tuple[str, str | None]]
    answer: Callable[[Handler], None]

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Handler], None]], Server]]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(answer: Callable[[Handler], None]) -> Server:
        servers.append(server := Server(("127.0.0.1", 0), Handler))
        server.asked, server.answer = [], answer
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[[Callable[[Handler], None]], Server]


def ask(url: str) -> str:
    return EndpointCaptioner(url, "m").describe(FRAMES, "What is it?")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(serve: Serve, status: int) -> None:
    other = serve(lambda handler: handler.say(ANSWER))
    first = serve(lambda handler: handler.say(b"", status, Location=f"http://{other.place}/v1/chat/completions?t=1"))
    with pytest.raises(UserError, match=rf"HTTP {status} \(it sends on to http://{other.place}/v1/chat/comp[^?]*\)"):
        ask(f"http://{first.place}/v1")
    assert first.asked == [("/v1/chat/completions", "Bearer sk-secret")]
    assert other.asked == []


def test_a_user_a_password_and_a_query_are_sent_and_not_shown(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(ANSWER))
    assert ask(f"http://me:pass%20word@{server.place}/v1?api-key=hidden") == "A cat."
    basic = base64.b64encode(b"me:pass word").decode()
    assert server.asked == [("/v1/chat/completions?api-key=hidden", f"Basic {basic}")]


def test_what_a_server_says_of_secrets_is_blotted_out(serve: Serve) -> None:
    server = serve(lambda handler: handler.say(b"no sk-secret, no pass word, no hidden", 401))
    with pytest.raises(UserError, match=r"401 \(no \*\*\*, no \*\*\*, no \*\*\*\)"):
        ask(f"http://me:pass%20word@{server.place}/v1?api-key=hidden")


@pytest.mark.parametrize(
    "url", ["http://me:pass:word@h:x/", "http://me:pass#word@h/", "http://h:99999999/", "http://h /"]
)
def test_an_address_that_cannot_be_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(UserError, match="is not an address") as caught:
        EndpointCaptioner(url)
    assert "pass" not in str(caught.value) and "word" not in str(caught.value)


def test_an_answer_without_end_is_cut(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1 << 20)
    sent = 0

    def pour(handler: Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            while sent < 1 << 28:
                sent += handler.wfile.write(b" " * (1 << 16))
        except OSError:
            pass

    with pytest.raises(UserError, match="answered with more than 1 MiB"):
        ask(f"http://{serve(pour).place}/v1")
    assert sent < 1 << 26


@pytest.mark.parametrize("part", ["headers", "body"])
def test_an_answer_that_drips_has_an_end(serve: Serve, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def drip(handler: Handler) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if part == "body" else b""))
            while not stop.wait(0.05):
                handler.wfile.write(b"a" if part == "body" else b"A: b\r\n")
        except OSError:
            pass

    begun = time.monotonic()
    monkeypatch.setattr(endpoint, "SECONDS", 0.3)
    socket.setdefaulttimeout(20)
    try:
        with pytest.raises(UserError, match="timed out|did not answer in JSON"):
            ask(f"http://{serve(drip).place}/v1")
    finally:
        socket.setdefaulttimeout(None)
        stop.set()
    assert time.monotonic() - begun < 5


def test_half_a_surrogate_pair_is_said_as_a_question_mark(serve: Serve) -> None:
    body = b'{"choices": [{"message": {"content": "A cat \\ud800 sits \\ud83d\\ude00."}}]}'
    assert ask(f"http://{serve(lambda handler: handler.say(body)).place}/v1") == "A cat ? sits \U0001f600."


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:word@host:8443/v1?key=k#f", "https://host:8443/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        ("HTTP://Host/v1", "http://host/v1"),
        ("ftp://host/", None),
        ("http://ho st/", None),
        ("http:///v1", None),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str | None) -> None:
    assert public_url(url) == shown


def test_a_path_is_shown_without_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_path(tmp_path / "a" / "b.mp4") == "a/b.mp4"
    assert public_path("/home/someone/films/b.mp4") == "b.mp4"
    assert public_path("../b.mp4") == "../b.mp4"
    assert public_path("Wan-AI/Wan2.2-TI2V-5B") == "Wan-AI/Wan2.2-TI2V-5B"


SECRETS = ("/nowhere", "hunter2", "hidden", "sk-secret")


def test_no_file_of_a_run_holds_a_secret_or_a_folder_of_this_machine(
    command: Callable[..., Seen], world: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda handler: handler.say(ANSWER))
    monkeypatch.setattr(prompting, "open_captioner", open_captioner)
    monkeypatch.chdir(tmp_path)
    url = f"http://me:hunter2@{server.place}/v1?key=hidden"
    words = f"--ckpt_dir {world}/ti2v --video {world}/source.mp4 --vlm_path m --vlm_url {url}"
    seen = command(f"{words} --dit {world}/dit.safetensors --lora {world}/light.safetensors:0.5")
    assert seen.code == 0, seen.output
    files = [file for file in seen.folder.rglob("*") if file.is_file()]
    assert len(files) == 12
    for file in files:
        held = file.read_bytes()
        assert not [secret for secret in (*SECRETS, str(world), str(tmp_path)) if secret.encode() in held], file
    record = json.loads(next(seen.folder.glob("video_01*.json")).read_text())
    assert (record["source"], record["ckpt_dir"], record["dit"]) == ("source.mp4", "ti2v", "dit.safetensors")
    assert record["vlm_url"] == f"http://{server.place}/v1"
    run = json.loads((seen.folder / "run.json").read_text())
    assert run["arguments"]["lora"] == ["light.safetensors:0.5"]
    assert "hidden" not in metadata(seen.clips[1].video)["comment"]


def test_code_from_the_hub_runs_by_its_commit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(*name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((*name, revision))
        raise ConnectionError("none")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(UserError, match="say which, as some/model@ and 40 digits of a commit"):
        open_captioner("some/model", device="cpu", trust_remote_code=True)
    for trusted in (True, False):
        with pytest.raises(UserError, match="cannot download"):
            captioner = open_captioner(f"some/model@{commit}", device="cpu", trust_remote_code=trusted)
            captioner.describe(FRAMES, "What is it?")
    assert asked == [("some/model", commit)] * 2
