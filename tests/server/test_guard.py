"""Who may ask: host, origin, key, token and size of a request, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wan.errors import UserError
from wan.options import OPTIONS, Settings, options_of
from wan.server.errors import ApiError, from_user_error, public
from wan.server.guard import COOKIE, POLICY, REPORT_POLICY, TOKEN, Guard, Keys
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


def test_only_these_pages_are_open_to_one_without_the_key(asking: Callable[..., Any]) -> None:
    for path in ("/health", "/login", "/static/app.css", "/static/app.js", "/static/icon.svg"):
        assert asking(path=path, key=KEY)[0] == 200, path
    for path in ("/chains/x", "/"):
        status, headers, body = asking(path=path, key=KEY)
        assert (status, headers["location"], body) == (303, "/login", b"")
    for path in ("/v1/chains/x", "/openapi.json", "/parts/queue", "/static/app.css/x"):
        assert asking(path=path, key=KEY)[0] == 401, path
    assert asking(path="/chains/x", key=KEY, host="evil")[0] == 403  # an error of another kind is no way to the key


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"bearer {KEY}", 200),
        (f"Bearer  {KEY} ", 200),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer é", 401),
    ],
)
def test_a_key_is_a_bearer_s(given: str, status: int, asking: Callable[..., Any]) -> None:
    assert asking(key=KEY, authorization=given)[0] == status


def test_a_server_without_a_key_needs_none_and_has_no_session(asking: Callable[..., Any]) -> None:
    keys = Keys(None, b"secret")
    assert not keys.needed and not keys.fits("") and Keys(KEY, b"x").needed
    assert Keys(KEY, b"x").fits(KEY) and not Keys(KEY, b"x").fits("")
    for one in (Keys(KEY, b"x"), keys):
        assert one.is_session(one.session) and one.is_token(one.token) and one.session != one.token
        assert not one.is_session(one.token) and not one.is_token(one.session) and not one.is_token("")
    for other in (Keys(KEY, b"y"), Keys(f"{KEY}2", b"x"), Keys(None, b"x")):  # of another server, or another key
        assert not other.is_session(Keys(KEY, b"x").session) and not other.is_token(Keys(KEY, b"x").token)
    assert asking(key=KEY, cookie=f"{COOKIE}={Keys(KEY, b'other').session}")[0] == 401


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ({"host": "LOCALHOST"}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]", "hosts": ("[::1]",)}, 200),
        ({"host": "[::1]:80", "hosts": ("[::1]",)}, 200),
        ({"host": "Name", "hosts": ("NAME",)}, 200),
        ({"host": ""}, 403),
        ({"host": "localhost.evil"}, 403),
        ({"host": "anything", "hosts": None}, 200),
        ({"origin": "https://localhost:8188"}, 200),
        ({"origin": "HTTP://LOCALHOST:8188"}, 200),
        ({"origin": "http://localhost"}, 403),  # another port
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"method": "POST", "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
        ({"origin": "http://evil", "sec_fetch_mode": "navigate"}, 403),
        ({"method": "POST", "path": "/login", "sec_fetch_site": "same-origin"}, 200),
        ({"method": "POST", "cookie": f"{COOKIE}=x"}, 403),
        ({"method": "POST", "cookie": "other=x"}, 200),
        ({"method": "HEAD", "sec_fetch_site": "same-origin"}, 200),
        ({"method": "OPTIONS", "sec_fetch_site": "same-origin"}, 200),
    ],
)
def test_who_may_ask_is_told_by_the_headers(words: dict[str, Any], status: int, asking: Callable[..., Any]) -> None:
    assert asking(**words)[0] == status


def test_a_request_may_be_as_large_as_it_may(asking: Callable[..., Any]) -> None:
    form = {"content_type": "Multipart/form-data; boundary=x"}
    assert asking("POST", body=[b"x" * 1000], most=1000, **form)[0] == 200
    assert asking("POST", body=[b"x" * 1001], most=1000, **form)[0] == 413
    assert asking("POST", content_length="1000", most=1000, **form)[0] == 200
    assert asking("POST", body=[b"x" * (1 << 20)], most=5)[0] == 200
    status, headers, body = asking("POST", body=[b"x" * ((1 << 20) + 1)], most=5)
    assert status == 413 and headers["connection"] == "close" and headers["content-length"] == str(len(body))
    assert json.loads(body)["error"] == {
        "message": "the request is larger than 1 MiB",
        "type": "invalid_request_error",
        "param": None,
        "code": "too_large",
    }
    message = json.loads(asking("POST", content_length="9" * 9, most=3 << 19, **form)[2])["error"]["message"]
    assert message == "the request is larger than 1.5 MiB"
    assert "connection" not in asking("POST", origin="http://evil")[1]


class Counted:
    """A guard with an app, and what its numbers say of what passed."""

    def __init__(self, answer: Any) -> None:
        self.metrics, self.answer, self.sent = Metrics(), answer, list[Any]()
        self.guard = Guard(self.app, keys=Keys(None, b"s"), hosts=None, most_bytes=1 << 20, metrics=self.metrics)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if isinstance(self.answer, Exception):
            raise self.answer
        status, headers = self.answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def __call__(self, method: str = "GET", path: str = "/x", kind: str = "http") -> dict[str, str]:
        async def send(message: Any) -> None:
            self.sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def ask() -> None:
            await self.guard({"type": kind, "method": method, "path": path, "headers": []}, receive, send)

        asyncio.run(ask())
        headers: list[Any] = next((one["headers"] for one in self.sent[::-1] if "headers" in one), [])
        return {name.decode(): value.decode() for name, value in headers}

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def test_answers_are_counted_by_their_kind() -> None:
    for method, status, label, timed in (
        ("GET", 200, "GET", 1),
        ("DELETE", 404, "DELETE", 1),
        ("PATCH", 507, "PATCH", 1),
        ("BREW", 405, "other", None),
    ):
        counted = Counted((status, []))
        counted(method)
        assert counted.count("wan_requests_total", method=label, status=f"{status // 100}xx") == 1
        assert counted.count("wan_request_seconds_count", method=label) == timed
        assert 0 <= (counted.count("wan_request_seconds_sum", method=label) or 0) < 30
    counted = Counted(KeyError("a bug"))
    with pytest.raises(KeyError):
        counted("POST")
    assert counted.count("wan_requests_total", method="POST", status="5xx") == 1
    assert counted.count("wan_request_seconds_count", method="POST") == 1


def test_how_long_somebody_listens_is_no_time_to_an_answer() -> None:
    for kind, timed in ((b"text/event-stream; charset=utf-8", None), (b"text/html", 1)):
        counted = Counted((200, [(b"Content-Type", kind)]))
        counted()
        assert counted.count("wan_request_seconds_count", method="GET") == timed
        assert counted.count("wan_requests_total", method="GET", status="2xx") == 1


def test_an_answer_has_headers_that_keep_pages_apart() -> None:
    headers = Counted((200, [(b"Cache-Control", b"max-age=5")]))()
    assert headers == {
        "Cache-Control": "max-age=5",  # its own
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "content-security-policy": POLICY,
    }
    assert Counted((200, []))()["cache-control"] == "no-store"
    for path, status, policy in (
        ("/old/x/report", 200, REPORT_POLICY),
        ("/old/x/report", 404, POLICY),
        ("/report/x", 200, POLICY),
    ):
        assert Counted((status, []))(path=path)["content-security-policy"] == policy


def test_only_requests_and_the_app_s_own_life_pass() -> None:
    counted = Counted((200, []))
    counted(kind="lifespan")
    assert len(counted.sent) == 2
    counted.sent.clear()
    counted(kind="websocket")
    assert counted.sent == [] and counted.count("wan_requests_total", method="GET", status="2xx") is None


def test_an_upload_that_breaks_off_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.server.guard._UPLOADS", 1)
    guard = Guard(inner, keys=Keys(None, b"secret"), hosts=None, most_bytes=10, metrics=Metrics())

    async def ask() -> list[int]:
        return [await send_slowly(guard, [(0.0, b"x" * 11)]) for _ in range(3)]

    assert asyncio.run(ask()) == [413] * 3


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("look at /v1/videos", "look at videos"),
        ("C:\\films\\a.mp4 is gone", "a.mp4 is gone"),
        ("in /", "in …"),
        ("in /srv/data/", "in …"),
        ("'/a b/c d'", "'a b/c d'"),
        ("http://host/a/b", "http://host/a/b"),
        ("a/b/c", "a/b/c"),
        ("(/a/b) /c/d,/e/f", "(b) d,f"),
    ],
)
def test_of_a_path_only_the_last_name_is_shown(message: str, shown: str) -> None:
    assert public(message) == shown


def test_an_error_names_the_setting_that_it_is_about() -> None:
    for text, param, named in (
        ("`from_` must be less", None, "from"),
        ("`vae` and `t5` differ", None, "vae"),
        ("`vae` is wrong", "mine", "mine"),
        ("nothing is right", None, None),
    ):
        error = from_user_error(UserError(text), param)
        assert (error.param, error.status) == (named, 400)
    assert ApiError("x", status=499).body["error"]["type"] == "invalid_request_error"
    assert ApiError("x", status=500).body["error"]["type"] == "server_error"
    assert ApiError("x").status == 400 and ApiError("x").headers == {}


def test_a_setting_that_a_form_leaves_empty_is_not_chosen() -> None:
    given = {"prompt": "", "custom_prompt": "", "sample_steps": None, "size": "", "from": 2}
    assert read_settings(given) == {"custom_prompt": "", "from_": 2.0}
    for name, value, message, param in (
        ("from_x", 1, "'from_x' is no setting", "from_x"),
        ("vae", 1, "'vae' is no setting that a client may choose", "vae"),
        ("x" * 99, 1, f"'{'x' * 60}' is no setting", "x" * 60),
        ("sample_steps", "x", "sample_steps must be a whole number", "sample_steps"),
        ("prompt", "x" * 20_001, "prompt is too long; 20000 characters are the most", "prompt"),
    ):
        with pytest.raises(ApiError) as wrong:
            read_settings({name: value})
        assert str(wrong.value).startswith(message) and wrong.value.param == param
    assert read_settings({"prompt": "x" * 20_000})["prompt"] == "x" * 20_000


def test_a_clip_says_what_it_may_and_nothing_else() -> None:
    pictures = {"a.png": "picture_1.png"}
    scene = {"cut": False, "prompt": None, "seed": 3, "name": "sea", "end_image": "a.png", "guidance": [1, 2]}
    assert read_clip(scene, pictures, 1) == {
        "seed": 3,
        "name": "sea",
        "end_image": "picture_1.png",
        "guidance": [1.0, 2.0],
    }
    for clip, message in (
        ({"lora": "x"}, "clip 7: 'lora' is nothing that a clip has; it has "),
        ({"cut": "b.png"}, "clip 7: no picture 'b.png' came with this"),
        ({"end_image": True}, "clip 7: end_image cannot be true"),
        ({"seed": "x"}, "clip 7: seed must be a whole number"),
    ):
        with pytest.raises(ApiError) as wrong:
            read_clip(clip, pictures, 7)
        assert str(wrong.value).startswith(message)
        assert wrong.value.param == ("seed" if "seed" in clip else "clips")


def test_an_upload_has_an_hour_and_a_minute_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [500.0], list[float]()
    loop = SimpleNamespace(time=lambda: now[0])

    async def wait_for(coming: Any, seconds: float) -> Any:
        waits.append(seconds)
        now[0] += 1795.0
        return await coming

    standing_in = SimpleNamespace(get_running_loop=lambda: loop, wait_for=wait_for)
    guard = Guard(inner, keys=Keys(None, b"secret"), hosts=None, most_bytes=1 << 20, metrics=Metrics())
    monkeypatch.setattr("wan.server.guard.asyncio", standing_in)
    assert asyncio.run(send_slowly(guard, [(0.0, b"x")] * 3)) == 200
    assert waits == [60.0, 60.0, 10.0]


def test_a_hundred_uploads_are_taken_at_once() -> None:
    guard = Guard(inner, keys=Keys(None, b"secret"), hosts=None, most_bytes=1 << 20, metrics=Metrics())

    async def ask() -> list[int]:
        return await asyncio.gather(*(send_slowly(guard, [(0.02, b"x")]) for _ in range(101)))

    assert sorted(asyncio.run(ask()))[-2:] == [200, 429]


def test_what_comes_after_a_request_may_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.server.guard._SILENT_SECONDS", 0.01)
    heard = list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), await receive()])
        await inner(scope, receive, send)

    coming = [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        await asyncio.sleep(0 if len(coming) == 3 else 0.05)
        return coming.pop(0)

    async def send(message: Any) -> None:
        heard.append(message)

    guard = Guard(app, keys=Keys(None, b"s"), hosts=None, most_bytes=1 << 20, metrics=Metrics())

    async def ask() -> None:
        await guard({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)

    asyncio.run(ask())
    assert [one["type"] for one in heard[:2]] == ["http.request", "http.disconnect"] and heard[2]["status"] == 200
