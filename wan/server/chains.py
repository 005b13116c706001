"""What clients may ask for: chains that are made, changed, extended and removed. Each is a row and a folder."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from wan.commands.flags import check_together
from wan.commands.job import CHAIN_FRAMES
from wan.configs import ModelConfig, parse_size
from wan.errors import UserError
from wan.files import link_or_copy
from wan.options import Settings
from wan.server.decode import decode
from wan.server.errors import ApiError, from_user_error, not_found
from wan.server.folders import ChainFolder
from wan.server.orders import read_clip, read_settings
from wan.server.supervisor import Supervisor
from wan.server.tickets import DONE, DRAFT, FAILED, MAKING, PAUSED, QUEUED, Queue, Ticket, new_id
from wan.server.wire import as_json, settings_of_chain
from wan.settings import Context

MODELS = {"wan2.2-i2v-a14b": 2, "v2v-14B": 2, "i2v-A14B": 2, "wan2.2-ti2v-5b": 1, "v2v-5B": 1, "ti2v-5B": 1}  # experts
DRAFTS_LIVE = 24 * 3600.0  # seconds until a chain that nobody started is removed
MOST_PICTURES = 50
SHOWN = (16, 48)  # channels of the latents that a preview can show: `wan.vae.preview.CHANNELS`, without PyTorch
_PLANS = asyncio.Semaphore(1)


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file that a client sent: its name there, and what is in it."""

    name: str
    data: BinaryIO


class Chains:
    """The chains of a server below its folder `root`; `owner` are the server's settings, `config` its model's row."""

    def __init__(self, root: Path, owner: Settings, config: ModelConfig, experts: int, queue: Queue) -> None:
        self.root, self.owner, self.config, self.experts, self.queue = root, owner, config, experts, queue
        self.jobs = root / "jobs"
        self.supervisor: Supervisor | None = None
        self._folders: dict[str, ChainFolder] = {}

    # --- looking

    def get(self, name: str) -> Ticket:
        """A chain. Raises ApiError."""
        try:
            return self.queue[name]
        except KeyError as error:
            raise not_found() from error

    def folder(self, name: str) -> ChainFolder:
        """Its folder."""
        if name not in self._folders:
            self._folders[name] = ChainFolder(self.jobs / name)
        return self._folders[name]

    def settings(self, ticket: Ticket) -> Settings:
        """All settings of a chain, those of the server among them."""
        return settings_of_chain(self.owner, self.order_of(ticket))

    def order_of(self, ticket: Ticket) -> dict[str, Any]:
        """What the worker is told of a chain, as JSON values."""
        folder = self.folder(ticket.id)
        return {
            **ticket.settings,
            "video": str(folder.path / ticket.source),
            "storyboard": str(folder.storyboard),
            "output_dir": str(folder.run),
            "num_videos": ticket.count,
            "yes": True,
            "preview": self.config.z_dim in SHOWN,
            "quiet": True,
            "log_file": None,
        }

    @property
    def model(self) -> str:
        """The name of the server's model."""
        return "wan2.2-i2v-a14b" if self.experts == 2 else "wan2.2-ti2v-5b"

    @property
    def fps(self) -> float:
        """Frames per second of what is made."""
        return float(self.config.sample_fps)

    # --- asking

    async def create(
        self,
        said: Mapping[str, Any],
        *,
        source: Upload | None = None,
        pictures: Sequence[Upload] = (),
        clips: Sequence[Mapping[str, Any]] = (),
        model: str | None = None,
        seconds: float | None = None,
        whole: bool = False,
        draft: bool = False,
    ) -> Ticket:
        """A new chain that continues a video, or starts from a picture or from text alone. Raises ApiError.

        `said` are settings by their names, as a client writes them. `seconds` chooses the fewest clips that reach it;
        `whole` puts the source before them.
        """
        self.check_model(model)
        self._check_queue()
        given = read_settings(said)
        if given.get("base_seed", -1) < 0:
            given["base_seed"] = secrets.randbits(31)
        async with self._new_folder() as folder:
            source_name, still = "source.png", True
            found: dict[str, Any] = {}
            if source is not None:
                await asyncio.to_thread(_store, source.data, folder.path / "source")
                found = await decode("inspect", folder.path / "source", folder.path / "source.png")
                if still := found["kind"] == "picture":
                    (folder.path / "source").unlink()
                else:
                    source_name = "source.mp4"
                    (folder.path / "source").rename(folder.path / source_name)
            elif self.experts == 2:
                raise ApiError(
                    "this server's model makes no video from text alone; send a picture or a video",
                    param="input_reference",
                )
            elif not (given.get("prompt") or (clips and clips[0].get("prompt"))):
                raise ApiError("a video from text alone needs a prompt", param="prompt")
            else:
                size = parse_size(given.get("size") or self.owner.size or self.config.sizes[0])
                Image.new("RGB", size, (110, 110, 110)).save(folder.path / source_name)
            names = await self._take_pictures(folder, pictures)
            scenes = [read_clip(clip, names, number) for number, clip in enumerate(clips, 1)]
            if still:
                first = {"cut": source_name if source is not None else True, **(scenes[0] if scenes else {})}
                scenes = [first, *scenes[1:]]
                if source is None and not first.get("prompt"):
                    first["prompt"] = given["prompt"]
            folder.write_clips(scenes or [{}])  # a run reads it again before each clip only if it is there at first
            count = int(given.pop("num_videos", None) or max(len(scenes), 1))
            if seconds is not None:
                count = max(self._clips_of(given, seconds, still), len(scenes))
            if whole and not still:
                given["include_source"] = True
            ticket = Ticket(
                id=folder.path.name.removeprefix(".new-"),
                state=DRAFT if draft else QUEUED,
                model=model or self.model,
                prompt=given.get("prompt"),
                title=_title(source),
                size=str(given.get("size") or self.owner.size or self.config.sizes[0]).replace("*", "x"),
                settings=given,
                source=source_name,
                still=still,
                count=count,
                seconds=self._seconds(given, count, still) + (found.get("seconds") or 0.0 if whole else 0.0),
            )
            self._check(ticket, scenes)
            return self._add(ticket, folder)

    async def extend(self, name: str, prompt: str, seconds: float | None, clips: int | None = None) -> Ticket:
        """A new chain that begins with all of a finished one, and goes on from its last clip as it is in memory.

        Raises ApiError.
        """
        before = self.get(name)
        old = self.folder(name)
        if before.state != DONE:
            raise ApiError(f"the video is {before.state}; only a completed one can be extended", param="video")
        self._check_queue()
        more = clips or (1 if seconds is None else self._clips_of(dict(before.settings), seconds, False))
        async with self._new_folder() as folder:
            await asyncio.to_thread(_link_inputs, old, folder)
            done = await asyncio.to_thread(folder.take_clips_of, old, before.count)
            if done < before.count:
                raise ApiError("files of the video are missing; it cannot be extended", status=409)
            scenes = [*old.read_clips(), *({} for _ in range(before.count))][: before.count]
            scenes += [{"prompt": prompt, "custom_prompt": ""} for _ in range(more)]
            folder.write_clips(scenes)
            ticket = dataclasses.replace(
                before,
                id=folder.path.name.removeprefix(".new-"),
                state=QUEUED,
                prompt=prompt,
                count=before.count + more,
                base=before.count,
                done=before.count,
                extends=name,
                remixed_from=None,
                completed_at=None,
                error=None,
                again=False,
                attempts=0,
                seconds=before.seconds + self._seconds(dict(before.settings), more, False),
            )
            self._check(ticket, scenes)
            return self._add(ticket, folder)

    async def remix(self, name: str, prompt: str) -> Ticket:
        """The same chain with another prompt; of an extension its own clips. Raises ApiError."""
        before, old = self.get(name), self.folder(name)
        self._check_queue()
        async with self._new_folder() as folder:
            await asyncio.to_thread(_link_inputs, old, folder)
            if before.base and await asyncio.to_thread(folder.take_clips_of, old, before.base) < before.base:
                raise ApiError("files of the video are missing; it cannot be made again", status=409)
            scenes = old.read_clips()
            for number, scene in enumerate(scenes, 1):
                if number > before.base and "prompt" in scene:
                    scene["prompt"] = prompt
            folder.write_clips(scenes)
            settings = dict(before.settings) | ({} if before.base else {"prompt": prompt})
            ticket = dataclasses.replace(
                before,
                id=folder.path.name.removeprefix(".new-"),
                state=QUEUED,
                prompt=prompt,
                settings=settings,
                done=before.base,
                remixed_from=name,
                completed_at=None,
                error=None,
                again=False,
                attempts=0,
            )
            self._check(ticket, scenes)
            return self._add(ticket, folder)

    def start(self, name: str) -> Ticket:
        """Let a draft wait for the worker, or a chain that was stopped, or that failed. Raises ApiError."""
        ticket = self.get(name)
        if ticket.state not in (DRAFT, PAUSED, FAILED):
            raise ApiError(f"the chain is {ticket.state}", status=409)
        self._check_queue()
        self.folder(name).forget_stop()
        return self._wait_again(name)

    def pause(self, name: str) -> Ticket:
        """Let a chain rest: one that waits at once, one that is being made after its clip. Raises ApiError."""
        ticket = self.get(name)
        if ticket.state == QUEUED:
            ticket = self.queue.change(name, state=PAUSED)
            self._tell(name, state=PAUSED)
        elif ticket.state == MAKING:
            self.folder(name).ask_to_stop()
            ticket = self.queue.change(name, again=False)
        else:
            raise ApiError(f"the chain is {ticket.state}", status=409)
        return ticket

    async def change(
        self,
        name: str,
        *,
        settings: Mapping[str, Any] | None = None,
        clips: Mapping[int, Mapping[str, Any]] | None = None,
        count: int | None = None,
        pictures: Sequence[Upload] = (),
    ) -> Ticket:
        """Other settings, another number of clips, or other things in clips, which are then made again.

        `clips` are by number, and a value of null takes a thing out. What changed ahead of the clip that is being made
        takes effect there; where something before it did, the run stops after that clip and begins again from what
        changed. Raises ApiError.
        """
        self.get(name)
        folder = self.folder(name)
        names = await self._take_pictures(folder, pictures)
        ticket = self.get(name)  # as it is now: a picture takes a while
        given = dict(ticket.settings)
        if settings:
            read = read_settings(settings)
            if read.get("base_seed", 0) < 0:
                read["base_seed"] = secrets.randbits(31)
            count = int(read.pop("num_videos", 0)) or count
            given |= read
        count = ticket.count if count is None else count
        if given.get("take"):  # what was chosen of a clip is not chosen of another
            given["take"] = [list(one) for one in given["take"] if one[0] not in (clips or {}) and one[0] <= count]
        before = folder.read_clips()
        scenes = [dict(scene) for scene in before]
        for number, clip in sorted((clips or {}).items()):
            if not 1 <= number <= count:
                raise ApiError(f"there is no clip {number} of {count}", param="clips")
            while len(scenes) < number:
                scenes.append({})
            own = read_clip({key: value for key, value in clip.items() if value is not None}, names, number)
            left = {key: value for key, value in scenes[number - 1].items() if key not in clip}
            scenes[number - 1] = left | own
        scenes = scenes[:count]
        changed = dataclasses.replace(ticket, settings=given, count=count, prompt=given.get("prompt", ticket.prompt))
        self._check(changed, scenes)
        now = self.supervisor.live[name].clip if self.supervisor and name in self.supervisor.live else 0
        past = [
            n for n, (a, b) in enumerate(zip(_padded(before, count), _padded(scenes, count), strict=True), 1) if a != b
        ]
        folder.write_clips(scenes or [{}])
        done = min([ticket.done, *(number - 1 for number in past)])
        values = {"settings": given, "count": count, "prompt": changed.prompt, "done": done}
        if ticket.state == MAKING:
            # the storyboard is read again before each clip; all else only when the run begins
            if given != ticket.settings or count != ticket.count or any(number <= now for number in past):
                folder.ask_to_stop()
            # that finds nothing to do if the storyboard was read in time
            return self.queue.change(name, again=True, **values)
        self.queue.change(name, **values)
        return self.get(name) if ticket.state in (DRAFT, QUEUED) else self.start_again(name)

    def start_again(self, name: str) -> Ticket:
        """Let a chain that was changed wait for the worker."""
        self.folder(name).forget_stop()
        return self._wait_again(name)

    async def redo(self, name: str, number: int, clip: Mapping[str, Any]) -> Ticket:
        """Make a clip again, with another seed unless the clip is told one, and what follows it. Raises ApiError."""
        said = dict(clip)
        if said.get("seed") in (None, ""):
            said["seed"] = secrets.randbits(31)
        return await self.change(name, clips={number: said})

    async def take(self, name: str, number: int, take: int) -> Ticket:
        """Go on from another take of a clip. Raises ApiError."""
        ticket = self.get(name)
        if take not in self.folder(name).takes(number):
            raise ApiError(f"clip {number} has no take {take}", param="take")
        kept = [list(one) for one in ticket.settings.get("take", []) if one[0] != number]
        values = {
            "settings": {**ticket.settings, "take": [*kept, [number, take]]},
            "done": min(ticket.done, number - 1),
        }
        if ticket.state == MAKING:
            self.folder(name).ask_to_stop()
            return self.queue.change(name, again=True, **values)
        self.queue.change(name, **values)
        return self.start_again(name)

    async def remove(self, name: str) -> None:
        """Forget a chain and all its files. Raises ApiError."""
        ticket = self.get(name)
        if ticket.state == QUEUED:
            self.queue.change(name, state=PAUSED)  # so that the worker does not begin with it now
        if self.supervisor is not None:
            await self.supervisor.cancel(name)
        self.queue.remove(name)
        if self.supervisor is not None:
            self.supervisor.forget(name)
        self._folders.pop(name, None)
        await asyncio.to_thread(self._remove_folder, name)

    async def plan(self, name: str) -> list[str]:
        """What a chain would be, in lines. Raises ApiError."""
        ticket = self.get(name)
        said = {"owner": as_json(self.owner), "settings": self.order_of(ticket)}
        async with _PLANS:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "wan.server.plan"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                out, _ = await asyncio.wait_for(process.communicate(json.dumps(said).encode()), 180)
            except TimeoutError as error:
                raise ApiError("the plan takes too long", status=503) from error
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        lines = out.decode(errors="replace").splitlines()
        if process.returncode == 2 and lines:
            raise ApiError(lines[-1])
        if process.returncode:
            raise ApiError("the plan cannot be made, which the server's log explains", status=500)
        return [line.replace(f", in {self.folder(name).run}", "") for line in lines]

    # --- keeping order

    def tidy(self) -> None:
        """After a start: remove what no row knows, and rows whose folder is gone; what was half made waits again."""
        self.queue.recover()
        known = {ticket.id for ticket in self.queue.all(drafts=True)}
        for path in self.jobs.iterdir() if self.jobs.exists() else ():
            if path.name not in known and re.fullmatch(r"(\.new-|\.gone-)?video_[0-9a-f]{32}", path.name):
                shutil.rmtree(path, ignore_errors=True)
        for name in known:
            if not (self.jobs / name).is_dir():
                self.queue.remove(name)
            elif self.queue[name].state in (QUEUED, MAKING) and not self.queue[name].again:
                continue
            elif self.queue[name].again:
                self.folder(name).forget_stop()
                self.queue.change(name, again=False)

    async def drop_old_drafts(self) -> None:
        """Remove what nobody started, once an hour for ever."""
        while True:
            for ticket in self.queue.all(drafts=True):
                if ticket.state == DRAFT and time.time() - ticket.created_at > DRAFTS_LIVE:
                    await self.remove(ticket.id)
            await asyncio.sleep(3600)

    def check_model(self, model: str | None) -> None:
        """Raise ApiError for a model that this server has not."""
        if model is None:
            return
        known = {name.lower(): experts for name, experts in MODELS.items()}
        if known.get(model.lower()) != self.experts:
            have = ", ".join(name for name, experts in MODELS.items() if experts == self.experts)
            raise ApiError(
                f"this server has no model {model[:60]!r}; it has {have}", param="model", code="model_not_found"
            )

    def _check_queue(self) -> None:
        if (waiting := self.queue.counts()[QUEUED]) >= self.owner.max_queue:
            raise ApiError(
                f"{waiting} chains are waiting already; try again later",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "60"},
            )

    def _check(self, ticket: Ticket, scenes: Sequence[Mapping[str, Any]]) -> None:
        """Raise ApiError for settings that do not go together, or for more than the server makes."""
        of, frames = ticket.settings, 0
        takes = max(of.get("takes") or self.owner.takes, of.get("best_of") or self.owner.best_of)
        for number in range(ticket.base + 1, ticket.count + 1):
            scene = scenes[number - 1] if number <= len(scenes) else {}
            frames += (scene.get("frames") or self._frames(of)) * (scene.get("takes") or takes)
        if frames > self.owner.max_frames:
            raise ApiError(
                f"{frames} frames are more than the {self.owner.max_frames} that this server makes of one chain",
                param="seconds",
            )
        try:
            settings = settings_of_chain(self.owner, {**of, "num_videos": ticket.count, "video": "x"})
            check_together("continuous", settings)
        except UserError as error:
            raise from_user_error(error) from error
        size = settings.size or self.config.sizes[0]
        if size not in self.config.sizes:
            sizes = ", ".join(one.replace("*", "x") for one in self.config.sizes)
            raise ApiError(f"size must be one of {sizes}; {size.replace('*', 'x')} is not", param="size")

    def _frames(self, settings: Mapping[str, Any]) -> int:
        given: int | None = settings.get("frame_num") or self.owner.frame_num
        return given or min(CHAIN_FRAMES, self.config.frame_num)

    def _new(self, settings: Mapping[str, Any]) -> int:
        """Frames that each clip adds."""
        of = settings_of_chain(self.owner, settings)
        return max(self._frames(settings) - Context.choose(of.continuation, of.context_frames).frames, 1)

    def _clips_of(self, settings: Mapping[str, Any], seconds: float, still: bool) -> int:
        """The fewest clips that are so long together."""
        try:
            first = self._frames(settings) if still else self._new(settings)
            rest = math.ceil(seconds * self.fps - 1e-6) - first
            return 1 + max(math.ceil(rest / self._new(settings)), 0)
        except UserError as error:
            raise from_user_error(error) from error

    def _seconds(self, settings: Mapping[str, Any], count: int, still: bool) -> float:
        """How long so many clips are together."""
        try:
            first = self._frames(settings) if still else self._new(settings)
            return (first + (count - 1) * self._new(settings)) / self.fps
        except UserError as error:
            raise from_user_error(error) from error

    async def _take_pictures(self, folder: ChainFolder, pictures: Sequence[Upload]) -> dict[str, str]:
        """The files that clips may name, by the names that the client gave them. Raises ApiError."""
        there = len(list(folder.path.glob("picture_*.png")))
        if there + len(pictures) > MOST_PICTURES:
            raise ApiError(f"a chain takes {MOST_PICTURES} pictures", param="pictures")
        found = {path.name: path.name for path in folder.path.glob("picture_*.png")}
        for picture in pictures:
            raw, name = folder.path / ".picture", f"picture_{secrets.token_hex(4)}.png"
            try:
                await asyncio.to_thread(_store, picture.data, raw)
                kind = (await decode("inspect", raw, folder.path / name))["kind"]
            finally:
                raw.unlink(missing_ok=True)
            if kind != "picture":
                (folder.path / name).unlink()
                raise ApiError(f"{picture.name[:80]!r} is no picture", param="pictures")
            found[picture.name] = name
        return found

    @asynccontextmanager
    async def _new_folder(self) -> AsyncIterator[ChainFolder]:
        """A folder that is filled in the block; it goes if that fails, as when the client has gone."""
        path = self.jobs / f".new-{new_id()}"
        path.mkdir(parents=True, mode=0o700)
        try:
            yield ChainFolder(path)
        finally:
            if path.exists():
                shutil.rmtree(path, ignore_errors=True)

    def _add(self, ticket: Ticket, folder: ChainFolder) -> Ticket:
        folder.path.rename(self.jobs / ticket.id)
        try:
            added = self.queue.add(ticket)
        except Exception:
            shutil.rmtree(self.jobs / ticket.id, ignore_errors=True)
            raise
        if self.supervisor is not None:
            self.supervisor.wake()
        return added

    def _wait_again(self, name: str) -> Ticket:
        ticket = self.queue.wait_again(name)
        self._tell(name, state=QUEUED)
        if self.supervisor is not None:
            self.supervisor.wake()
        return ticket

    def _tell(self, name: str, **said: Any) -> None:
        if self.supervisor is not None:
            self.supervisor.tell(name, "state", **said)

    def _remove_folder(self, name: str) -> None:
        gone = self.jobs / f".gone-{name}"
        (self.jobs / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _title(source: Upload | None) -> str:
    name = "" if source is None else Path(source.name.replace("\\", "/")).name
    return "".join(char for char in name if char.isprintable())[:100]


def _store(data: BinaryIO, path: Path) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(data, file, 1 << 20)


def _link_inputs(old: ChainFolder, new: ChainFolder) -> None:
    for file in [*old.path.glob("source.*"), *old.path.glob("picture_*.png")]:
        link_or_copy(file, new.path / file.name)


def _padded(scenes: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    return [*scenes, *({} for _ in range(count))][:count]
