"""Starts a server: its settings and checkpoint are checked, then it listens."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout
from PIL import Image

from wan.commands.job import Job
from wan.commands.progress import say
from wan.configs import ModelConfig
from wan.device.ranks import World
from wan.errors import UserError
from wan.options import Settings
from wan.server.app import create_app
from wan.server.guard import LOOPBACK

LOCK = ".server.lock"
KEY = "WAN_API_KEY"
_SHORTEST_KEY = 16  # characters


def serve(settings: Settings) -> None:
    """Listen until a signal; of several processes the first. Raises UserError."""
    world = World.read(os.environ)
    if os.environ.get("LOCAL_WORLD_SIZE", str(world.size)) != str(world.size):
        raise UserError("a server works on the GPUs of one machine; start torchrun there alone")
    if not world.is_first:
        return  # the first process starts the worker of each GPU, and starts it again where one is lost
    key = read_key(settings)
    loopback = is_loopback(settings.host)
    if not loopback and key is None:
        raise UserError(
            f"`host` {settings.host} can be reached from other machines: give `api_key_file`, or the key in {KEY}"
        )
    settings = _absolute(settings)
    root = Path(settings.output_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / LOCK)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"`output_dir` {root} is in use by another server; give another folder") from error
    except OSError as error:
        raise UserError(f"`output_dir` {root} cannot be used: {error.strerror}; give another") from error
    with lock:
        config = _config(settings, root)
        uploads = root / ".uploads"
        uploads.mkdir(exist_ok=True, mode=0o700)
        tempfile.tempdir = str(uploads)  # files that are being sent; they have no names
        listener = _listen(settings.host, settings.port)
        port = listener.getsockname()[1]
        app = create_app(
            settings,
            config,
            2 if config.name == "v2v-14B" else 1,
            key=key,
            # with a key a name that leads here by a trick has none
            hosts=(*LOOPBACK, settings.host) if loopback else None,
            ranks=world.size,
        )
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"http://{shown}:{port}/")
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        server = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5, date_header=True
        )
        uvicorn.Server(server).run(sockets=[listener])


def _config(settings: Settings, root: Path) -> ModelConfig:
    """The row of the checkpoint, when all that the settings name was looked at. Raises UserError."""
    still = root / ".still.png"
    Image.new("RGB", (64, 64)).save(still)
    try:
        return Job.read("continuous", dataclasses.replace(settings, video=str(still))).config
    finally:
        still.unlink()


def read_key(settings: Settings) -> str | None:
    """The API key, from its file or the environment, from where it is removed. Raises UserError."""
    key = os.environ.pop(KEY, None)
    if settings.api_key_file is not None:
        path = Path(settings.api_key_file)
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"`api_key_file` {path} cannot be read; give a file with one line of text") from error
    if key is None:
        return None
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the API key must be at least {_SHORTEST_KEY} plain characters without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise UserError(f"`port` {port} of {host} cannot be used: {reason}; give another") from error
    return listener


def _absolute(settings: Settings) -> Settings:
    """The settings with paths that mean the same wherever they are used."""
    paths: dict[str, Any] = {}
    for name in ("output_dir", "ckpt_dir", "comfy_dir", "vlm_path", "dit", "dit_high", "dit_low", "vae", "t5"):
        value = getattr(settings, name)
        if value and (name == "output_dir" or Path(value).expanduser().exists()):  # a hub's id is none
            paths[name] = str(Path(value).expanduser().resolve())
    return dataclasses.replace(settings, **paths)
