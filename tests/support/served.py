"""A real server in a process of its own, on the tiny 5B of models/."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.golden import ROOT

MODELS = ROOT / "models"
SHAPES = ROOT / "examples" / "shapes.mp4"
QUICK = ("--frame_num", "5", "--sample_steps", "2")


def form(fields: dict[str, Any], files: Sequence[tuple[str, str, bytes]] = ()) -> tuple[bytes, str]:
    """The body of a form with files, each a field, a name and its bytes, and its type."""
    edge = "edge-of-a-part"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for field, name, data in files:
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"


@dataclass
class Served:
    """A server that listens, and the folder of its chains."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    def ask(
        self, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of an answer; its text where it is none."""
        status, data, _ = self.fetch(path, method, None if body is None else json.dumps(body).encode(), headers)
        try:
            return status, json.loads(data)
        except ValueError:
            return status, data.decode(errors="replace")

    def fetch(
        self, path: str, method: str = "GET", data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer."""
        kind = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, kind | (headers or {}), method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read(), {name.lower(): value for name, value in answer.headers.items()}
        except urllib.error.HTTPError as error:
            return error.code, error.read(), {name.lower(): value for name, value in error.headers.items()}

    def send(self, path: str, fields: dict[str, Any], files: Sequence[tuple[str, str, bytes]] = ()) -> tuple[int, Any]:
        """POST a form with files, each a field, a name and its bytes."""
        body, kind = form(fields, files)
        status, data, _ = self.fetch(path, "POST", body, {"Content-Type": kind})
        return status, json.loads(data)

    def wait(self, name: str, *states: str, seconds: float = 120) -> Any:
        """A chain when it is in one of these states."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status, chain = self.ask(f"/v1/chains/{name}")
            assert status == 200, chain
            if chain["status"] in states:
                return chain
            assert chain["status"] != "failed", chain["error"]
            time.sleep(0.1)
        raise AssertionError(f"{chain['status']} after {seconds} s, and not {states}")


@contextmanager
def serving(
    folder: Path, *words: str, model: str = "tiny-Wan2.2-TI2V-5B", key: str | None = None, program: Sequence[str] = ()
) -> Iterator[Served]:
    """A server until the block ends. `program` is another one than `wan.server`."""
    environment = {name: value for name, value in os.environ.items() if name != "WAN_API_KEY"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"WAN_API_KEY": key} if key else {})
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", *(program or ("wan.server",)), "--ckpt_dir", str(MODELS / model)),
            *("--vlm_path", str(MODELS / "tiny-InternVL"), "--output_dir", str(folder), "--port", "0", *words),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip().rstrip("/")
        assert url, f"the server ended with {process.wait(10)}"
        yield Served(process, url, folder)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()
        process.stdout.close()
