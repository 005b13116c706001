"""How a server starts: its key, its folder, its port, and what it tells its app."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from wan.configs import v2v_5B, v2v_14B
from wan.errors import UserError
from wan.options import Settings
from wan.server import main
from wan.server.guard import LOOPBACK

KEY = "a-key-of-some-length"


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("a" * 16, True),
        ("a" * 15, False),
        (f"{KEY} {KEY}", False),
        (f"{KEY}é", False),
        (f"{KEY}\n{KEY}", False),
        (f"{KEY}\x7f", False),
        ("", False),
    ],
)
def test_a_key_is_plain_and_long(key: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(main.KEY, raising=False)
    (tmp_path / "key").write_text(f"  {key}\n", encoding="utf-8")
    settings = Settings(api_key_file=str(tmp_path / "key"))
    if fits:
        assert main.read_key(settings) == key
    else:
        with pytest.raises(UserError, match="the API key must be at least 16 plain characters without spaces"):
            main.read_key(settings)


def test_the_key_of_a_file_comes_before_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.read_key(Settings()) is None
    monkeypatch.setenv(main.KEY, f"{KEY}-2")
    (tmp_path / "key").write_text(KEY, encoding="utf-8")
    assert main.read_key(Settings(api_key_file=str(tmp_path / "key"))) == KEY and main.KEY not in os.environ
    (tmp_path / "key").write_bytes(b"\xff" * 20)
    for name in ("key", "none"):
        with pytest.raises(UserError, match=f"api_key_file .*{name} cannot be read; give a file with one line of text"):
            main.read_key(Settings(api_key_file=str(tmp_path / name)))


def test_a_port_is_listened_to_once() -> None:
    with main._listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and listener.family == socket.AF_INET
        with socket.create_connection((host, port), timeout=5):
            pass
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used: .*; give another"):
            main._listen("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)) as other, socket.create_connection((host, port)) as client:
        other.accept()[0].close()  # the server ends it first, which leaves the port in a state of its own
        assert client.recv(1) == b""
    main._listen("127.0.0.1", port).close()


def test_paths_mean_the_same_wherever_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("m", "home/vlm"):
        (tmp_path / name).mkdir(parents=True)
    given = Settings(output_dir="out", ckpt_dir="m", vlm_path="~/vlm", vae="hub/id", t5="", dit="m")
    made = main._absolute(given)
    assert (made.output_dir, made.ckpt_dir, made.dit) == (
        str(tmp_path / "out"),
        str(tmp_path / "m"),
        str(tmp_path / "m"),
    )
    assert (made.vlm_path, made.vae, made.t5) == (str(tmp_path / "home/vlm"), "hub/id", "")
    assert main._absolute(Settings(output_dir="~/out")).output_dir == str(tmp_path / "home/out")


def test_a_checkpoint_is_looked_at_as_for_a_chain_from_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(kind: str, settings: Settings) -> Any:
        assert kind == "continuous" and settings.ckpt_dir == "m" and settings.video is not None
        with Image.open(settings.video) as still:
            assert still.size == (64, 64)
        if settings.quiet:
            raise UserError("no checkpoint")
        return SimpleNamespace(config=v2v_5B)

    monkeypatch.setattr("wan.server.main.Job.read", read)
    assert main._config(Settings(ckpt_dir="m"), tmp_path) is v2v_5B
    with pytest.raises(UserError, match="no checkpoint"):
        main._config(Settings(ckpt_dir="m", quiet=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a server that would have started was given."""
    given = list[Any]()

    def create_app(*words: Any, **more: Any) -> str:
        given.append((words, more))
        return "an app"

    class Server:
        def __init__(self, config: Any) -> None:
            given.append(config)

        def run(self, sockets: list[socket.socket]) -> None:
            given.append(sockets[0].getsockname()[1])
            sockets[0].close()

    monkeypatch.delenv(main.KEY, raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(main, "create_app", create_app)
    monkeypatch.setattr("uvicorn.Config", lambda app, **more: (app, more))
    monkeypatch.setattr("uvicorn.Server", Server)
    monkeypatch.setattr(main, "_config", lambda settings, root: v2v_14B if settings.quiet else v2v_5B)
    return given


def test_a_server_of_this_machine_answers_to_its_names(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(ckpt_dir="x", output_dir=str(tmp_path / "out/deep"), port=0)
    main.serve(settings)
    (words, more), (app, options), port = started
    assert words == (settings, v2v_5B, 1)
    assert more == {"key": None, "hosts": (*LOOPBACK, "127.0.0.1"), "ranks": 1}
    assert app == "an app" and options["timeout_graceful_shutdown"] == 5
    assert (options["access_log"], options["server_header"], options["log_config"]) == (False, False, None)
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}/\n"
    uploads = tmp_path / "out/deep/.uploads"
    assert uploads.stat().st_mode & 0o777 == 0o700 and tempfile.gettempdir() == str(uploads)
    main.serve(settings)  # in the same folder, when the first one has gone
    with FileLock(tmp_path / "out/deep" / main.LOCK), pytest.raises(UserError, match="is in use by another server"):
        main.serve(settings)


def test_a_server_that_others_reach_has_a_key_and_answers_to_any_name(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(ckpt_dir="x", host="0.0.0.0", output_dir=str(tmp_path), port=0, quiet=True)
    with pytest.raises(UserError, match="0.0.0.0 can be reached from other machines: give `?api_key_file"):
        main.serve(settings)
    monkeypatch.setenv(main.KEY, KEY)
    main.serve(settings)
    (words, more), *_ = started
    assert words[1:] == (v2v_14B, 2) and more == {"key": KEY, "hosts": None, "ranks": 1}
    assert capsys.readouterr().out == f"http://0.0.0.0:{started[-1]}/\n"


def test_an_address_of_ipv6_is_shown_in_brackets(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families = list[Any]()

    def listener(family: Any, kind: Any) -> socket.socket:
        families.append(family)
        return new_socket(socket.AF_INET, kind)  # a machine may have no IPv6

    new_socket, bind = socket.socket, socket.socket.bind
    monkeypatch.setattr("wan.server.main.socket.socket", listener)
    monkeypatch.setattr(new_socket, "bind", lambda self, place: bind(self, ("127.0.0.1", place[1])))
    monkeypatch.setenv(main.KEY, KEY)
    main.serve(Settings(ckpt_dir="x", host="::1", output_dir=str(tmp_path), port=0))
    assert families == [socket.AF_INET6]
    assert started[0][1] == {"key": KEY, "hosts": (*LOOPBACK, "::1"), "ranks": 1}
    assert capsys.readouterr().out == f"http://[::1]:{started[-1]}/\n"


def test_the_first_of_several_processes_serves_for_all(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.server.main.World.read", lambda _: SimpleNamespace(size=3, is_first=True))
    main.serve(Settings(ckpt_dir="x", output_dir=str(tmp_path), port=0))
    assert started[0][1]["ranks"] == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a server works on the GPUs of one machine"):
        main.serve(Settings(ckpt_dir="x", output_dir=str(tmp_path), port=0))


def test_a_folder_that_cannot_be_used_is_one_line(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir .*file/x cannot be used: .*; give another"):
        main.serve(Settings(ckpt_dir="x", output_dir=str(tmp_path / "file/x"), port=0))
    assert started == []
