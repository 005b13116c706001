"""Who may ask: host, origin, key, token and size of a request, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wan.errors import UserError
from wan.options import OPTIONS, Settings, options_of
from wan.server.errors import ApiError, public
from wan.server.guard import COOKIE, TOKEN, Guard, Keys
from wan.server.main import is_loopback, read_key
from wan.server.metrics import Metrics
from wan.server.orders import CLIENT, read_clip, read_settings
from wan.server.tickets import MAKING, Queue, Ticket, new_id

KEY = "a-key-of-some-length"


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads all of the body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


@pytest.fixture
def asking() -> Callable[..., tuple[int, dict[str, str], Any]]:
    def ask(
        method: str = "GET",
        path: str = "/v1/videos",
        *,
        key: str | None = None,
        hosts: Any = ("localhost",),
        body: list[bytes] | None = None,
        most: int = 1 << 20,
        **headers: str,
    ) -> tuple[int, dict[str, str], Any]:
        keys = Keys(key, b"secret")
        guard = Guard(inner, keys=keys, hosts=hosts, most_bytes=most, metrics=Metrics())
        parts = body or [b""]
        messages = [
            {"type": "http.request", "body": part, "more_body": n < len(parts)} for n, part in enumerate(parts, 1)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        request_headers = {"host": "localhost:8188"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        request_headers = {
            name: value.replace("TOKEN", keys.token).replace("SESSION", keys.session)
            for name, value in request_headers.items()
        }
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(k.encode(), v.encode()) for k, v in request_headers.items()],
        }
        asyncio.run(guard(scope, receive, send))
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answered, sent[1]["body"]

    return ask


def test_a_program_on_this_machine_may_ask(asking: Callable[..., Any]) -> None:
    status, headers, body = asking("POST")
    assert (status, body) == (200, b"in")
    assert (
        headers["content-security-policy"].startswith("default-src 'none'")
        and headers["x-content-type-options"] == "nosniff"
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({"host": "evil.example"}, "wrong_host"),  # a name that leads here by DNS
        ({"origin": "http://evil.example"}, "wrong_origin"),
        ({"origin": "null"}, "wrong_origin"),
        ({"sec_fetch_site": "cross-site"}, "wrong_origin"),
        ({"method": "POST", "origin": "http://localhost:8188"}, "wrong_token"),
        ({"method": "POST", "sec_fetch_site": "same-origin"}, "wrong_token"),
        ({"method": "DELETE", "cookie": f"{COOKIE}=SESSION"}, "wrong_token"),
    ],
)
def test_a_page_in_the_user_s_browser_cannot_drive_the_server(
    asking: Callable[..., Any], words: dict[str, str], code: str
) -> None:
    status, _, body = asking(**words)
    assert status == 403 and json.loads(body)["error"]["code"] == code


def test_our_own_page_may_ask_and_a_link_may_lead_to_it(asking: Callable[..., Any]) -> None:
    headers = {"origin": "http://localhost:8188", "sec_fetch_site": "same-origin", TOKEN: "TOKEN"}
    assert asking("POST", **headers)[0] == 200
    assert asking("GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200


def test_a_key_is_asked_for(asking: Callable[..., Any]) -> None:
    status, headers, body = asking(key=KEY)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert asking(key=KEY, authorization=f"Bearer {KEY}x")[0] == 401
    assert asking(key=KEY, authorization=f"Bearer {KEY}", hosts=None, host="anything")[0] == 200
    assert asking(key=KEY, cookie=f"{COOKIE}=SESSION")[0] == 200
    assert asking("POST", key=KEY, cookie=f"{COOKIE}=SESSION")[0] == 403
    assert asking(path="/health", key=KEY)[0] == 200 and asking(path="/metrics", key=KEY)[0] == 401
    assert asking(path="/", key=KEY)[1]["location"] == "/login"


def test_a_request_that_is_too_large_ends(asking: Callable[..., Any]) -> None:
    form = {"content_type": "multipart/form-data; boundary=x"}
    assert asking("POST", body=[b"x" * 600, b"x" * 600], most=1000, **form)[0] == 413  # it said nothing of its length
    assert asking("POST", content_length="1001", most=1000, **form)[0] == 413
    assert asking("POST", content_length="x", **form)[0] == 413
    assert asking("POST", body=[b"x" * (2 << 20)], most=1 << 30)[0] == 413  # JSON needs no more than 1 MiB
    assert asking("POST", body=[b"x" * 600], most=1000, **form)[0] == 200


async def send_slowly(guard: Guard, parts: list[tuple[float, bytes]]) -> int:
    """The status of an upload whose parts come after so many seconds each."""
    coming = iter([*enumerate(parts, 1)])
    sent: list[Any] = []

    async def receive() -> Any:
        number, (seconds, part) = next(coming, (0, (3600.0, b"")))
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": part, "more_body": number < len(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    await guard({"type": "http", "method": "POST", "path": "/v1/videos", "headers": headers}, receive, send)
    return int(sent[0]["status"])


def test_an_upload_may_take_long_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*parts: tuple[float, bytes]) -> int:
        keys = Keys(None, b"secret")
        return asyncio.run(
            send_slowly(Guard(inner, keys=keys, hosts=None, most_bytes=1 << 20, metrics=Metrics()), list(parts))
        )

    monkeypatch.setattr("wan.server.guard._SILENT_SECONDS", 0.2)
    assert ask((0.1, b"x"), (0.1, b"x"), (0.1, b"x")) == 200
    assert ask((0.0, b"x"), (30.0, b"x")) == 408  # a client that fell silent
    monkeypatch.setattr("wan.server.guard._UPLOAD_SECONDS", 0.25)
    assert ask(*[(0.1, b"x")] * 5) == 408  # one that sends a byte now and then


def test_more_uploads_than_there_is_room_for_are_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.server.guard._UPLOADS", 2)
    guard = Guard(inner, keys=Keys(None, b"secret"), hosts=None, most_bytes=1 << 20, metrics=Metrics())

    async def ask() -> list[int]:
        first = await asyncio.gather(*(send_slowly(guard, [(0.05, b"x"), (0.05, b"x")]) for _ in range(3)))
        return sorted([*first, await send_slowly(guard, [(0.0, b"x")])])

    assert asyncio.run(ask()) == [200, 200, 200, 429]  # the last came when the others had gone


def test_clients_set_the_rows_that_are_marked_for_them() -> None:
    assert set(CLIENT) == {one.name for one in options_of("continuous") if one.client and one.flag}
    for one in OPTIONS.values():
        if one.name not in CLIENT:
            with pytest.raises(ApiError, match="is no setting"):
                read_settings({one.name: "x"})
    fields = {
        "sample_guide_scale": [1, 2],
        "guidance_interval": "0.1 0.9",
        "from": "1.5",
        "size": "160x96",
        "include_source": "true",
        "take": [[5, 2]],
        "prompt_for": [[5, "it turns"]],
    }
    settings = read_settings(fields)
    assert settings == {
        "sample_guide_scale": (1, 2),
        "guidance_interval": (0.1, 0.9),
        "from_": 1.5,
        "size": "160*96",
        "include_source": True,
        "take": ((5, 2),),
        "prompt_for": ((5, "it turns"),),
    }
    assert read_settings({"take": "5=2 6=1", "include_source": "false"})["take"] == ((5, 2), (6, 1))
    for name, value in {
        "sample_steps": "x",
        "prompt": {},
        "prompt_mode": "sing",
        "sample_shift": True,
        "prompt_for": [[1]],
        "take": [[5, 2], [5, 1]],
    }.items():
        with pytest.raises(ApiError):
            read_settings({name: value})


def test_a_clip_names_only_pictures_that_came_with_it() -> None:
    assert read_clip({"cut": "a.png", "seed": "3", "prompt": ""}, {"a.png": "picture_1.png"}, 1) == {
        "cut": "picture_1.png",
        "seed": 3,
    }
    assert read_clip({"cut": True}, {}, 1) == {"cut": True}
    for clip in (
        {"end_image": "../../a.png"},
        {"lora": "x"},
        {"prompt": True},
        {"frames": 6},
        {"prompt": "x" * 20_001},
    ):
        with pytest.raises(ApiError):
            read_clip(clip, {}, 1)


def test_no_path_is_in_an_error() -> None:
    error = "cannot write '/srv/data/jobs/video_1/run/video_01.mp4': disk full (in /home/me/x)"
    assert public(error) == "cannot write 'video_01.mp4': disk full (in x)"
    assert public("size must be 160*96 or 1/2") == "size must be 160*96 or 1/2"


def test_a_server_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wan.server.main import serve

    monkeypatch.delenv("WAN_API_KEY", raising=False)
    assert is_loopback("127.0.0.2") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    with pytest.raises(UserError, match="can be reached from other machines"):
        serve(Settings(ckpt_dir="x", host="0.0.0.0", output_dir=str(tmp_path)))
    file = tmp_path / "key"
    file.write_text("short\n")
    with pytest.raises(UserError, match="at least 16"):
        read_key(Settings(api_key_file=str(file)))
    monkeypatch.setenv("WAN_API_KEY", KEY)
    import os

    assert read_key(Settings()) == KEY and "WAN_API_KEY" not in os.environ  # no child gets it


def test_the_queue_keeps_its_order_and_what_was_half_made_comes_first(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite3")
    names = [queue.add(Ticket(new_id(), settings={"n": number})).id for number in range(3)]
    assert len(set(names)) == 3 and queue.next() == queue[names[0]]
    queue.change(names[0], state="paused")
    queue.change(names[2], state=MAKING, done=1)
    secret = queue.secret()
    queue.close()
    queue = Queue(tmp_path / "queue.sqlite3")
    queue.recover()
    assert queue.secret() == secret and (tmp_path / "queue.sqlite3").stat().st_mode & 0o77 == 0
    following = queue.next()
    assert following is not None and (following.id, following.done, following.settings) == (names[2], 1, {"n": 2})
    queue.wait_again(names[2])
    assert queue.next() == queue[names[1]]
    assert [one.id for one in queue.all()] == names[::-1]
    assert [one.id for one in queue.all(after=names[0], newest_first=False, limit=1)] == [names[1]]
    queue.remove(names[1])
    with pytest.raises(KeyError):
        queue[names[1]]
