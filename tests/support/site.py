"""The app of a server in this process, without a worker: what it answers, and what that leaves on the disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.served import form
from wan.configs import v2v_5B, v2v_14B
from wan.options import Settings
from wan.server import app
from wan.server.chains import Chains
from wan.server.errors import ApiError
from wan.server.metrics import Metrics
from wan.server.supervisor import Supervisor
from wan.server.tickets import Ticket

VIDEO, PICTURE = b"a video", b"a picture"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> tuple[int, str, str | None]:
        """Status, message and the field that it is about."""
        error = self.json["error"]
        return self.status, error["message"], error["param"]


async def look(what: str, file: Path, picture: Path) -> dict[str, Any]:
    """In place of `wan.server.decode.decode`: a file says itself what it is. A video has 2 s."""
    data = file.read_bytes()
    if what != "inspect":
        picture.write_bytes(b"a %s" % what.encode())
        return {}
    if data not in (VIDEO, PICTURE):
        raise ApiError("the file is neither a video nor a picture that can be read")
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    return {"kind": "picture" if data == PICTURE else "video", "seconds": 0.0 if data == PICTURE else 2.0}


class Site:
    """The app, its chains, and a supervisor that has no worker."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, experts: int = 1, **given: Any) -> None:
        made = list[Chains]()

        def chains(*words: Any) -> Chains:
            made.append(Chains(*words))
            return made[0]

        for module in ("intake", "jobs", "videos"):
            monkeypatch.setattr(f"wan.server.{module}.decode", look)
        monkeypatch.setattr(app, "Chains", chains)
        words = {name: given.pop(name) for name in ("key", "hosts") if name in given}
        self.owner = Settings(**{"ckpt_dir": "x", "output_dir": str(folder), **given})
        self.app = app.create_app(self.owner, v2v_14B if experts == 2 else v2v_5B, experts, **words)
        (self.chains,) = made
        self.queue, self.folder = self.chains.queue, folder
        self.supervisor = Supervisor(self.queue, folder, {}, self.chains.order_of, Metrics())
        self.chains.supervisor = self.supervisor

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: Any = None,
        files: Sequence[tuple[str, str, bytes]] | None = None,
        meanwhile: Callable[[], Any] | None = None,
        **headers: str,
    ) -> Answer:
        """The answer to a request; its body is JSON, or with `files` a form. `meanwhile` is called once it waits."""
        names = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        if files is not None:
            data, names["content-type"] = form(body or {}, files)
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "scheme": "http",
            "server": ("localhost", 80),
            "client": ("here", 1),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in names.items()],
        }
        sent = list[Any]()

        async def send(message: Any) -> None:
            sent.append(message)

        async def work() -> None:
            parts = [{"type": "http.request", "body": data}]

            async def receive() -> Any:
                if parts:
                    return parts.pop()
                return await asyncio.sleep(60)

            asking = asyncio.ensure_future(self.app(scope, receive, send))
            if meanwhile is not None:
                while len(sent) < 2:  # it has begun to answer
                    await asyncio.sleep(0.001)
                meanwhile()
            await asyncio.wait_for(asking, 20)

        asyncio.run(work())
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], answered, b"".join(one.get("body", b"") for one in sent[1:]))

    def post(self, path: str, body: Any = None, *files: tuple[str, str, bytes], method: str = "POST") -> Answer:
        """Post JSON, or a form with files."""
        return self.ask(path, method, body, files or None)

    def new(self, **fields: Any) -> str:
        """A new chain from text."""
        answer = self.post("/v1/chains", {"prompt": "A boat.", **fields})
        assert answer.status == 201, answer
        return str(answer.json["id"])

    def ticket(self, name: str) -> Ticket:
        return self.queue[name]

    def finish(self, name: str, *, state: str = "completed") -> Ticket:
        """Let the clips of a chain be there."""
        folder, count = self.chains.folder(name), self.ticket(name).count
        folder.run.mkdir(exist_ok=True)
        clips = [
            {"number": number, "file": f"video_{number}.mp4", "prompt": f"p{number}", "seed": 100 + number}
            for number in range(1, count + 1)
        ]
        facts = {"clips": clips, "common": {"width": 832, "height": 480}, "drift": {"colour": [0.0]}}
        (folder.run / "report.json").write_text(json.dumps(facts), encoding="utf-8")
        (folder.run / "run.json").write_text("{}", encoding="utf-8")
        (folder.run / "report.html").write_text("<p>the report", encoding="utf-8")
        folder.joined.write_bytes(b"the whole")
        for clip in clips:
            for ending in (".mp4", ".json", ".safetensors"):
                (folder.run / str(clip["file"])).with_suffix(ending).write_text(f"{clip['number']}{ending}")
        return self.queue.change(name, state=state, done=count, completed_at=1234)
