"""How a chain comes to be: from a video, a picture or text, as a longer one, or with another prompt."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from wan.server.decode import decode
from wan.server.errors import ApiError
from wan.server.folders import ChainFolder
from wan.server.jobs import Jobs, Upload, link_inputs, take_pictures
from wan.server.offer import Offer
from wan.server.orders import read_clip, read_settings
from wan.server.tickets import DONE, DRAFT, QUEUED, Queue, Ticket


@dataclass(frozen=True)
class Intake:
    """Takes new chains into the queue, of which `most_waiting` may wait, and calls `wake` for each."""

    folders: Jobs
    offer: Offer
    queue: Queue
    most_waiting: int
    wake: Callable[[], None]

    async def create(
        self,
        asked: Mapping[str, Any],
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

        `asked` are settings by their names, as a client writes them. `seconds` chooses the fewest clips that reach it;
        `whole` puts the source before them.
        """
        self.offer.check_model(model)
        self.check_queue()
        given = read_settings(asked)
        if given.get("base_seed", -1) < 0:
            given["base_seed"] = secrets.randbits(31)
        async with self.folders.new() as folder:
            source_name, still = "source.png", True
            source_seconds = 0.0
            if source is not None:
                await asyncio.to_thread(source.store, folder.path / "source")
                facts = await decode("inspect", folder.path / "source", folder.path / "source.png")
                source_seconds = facts.get("seconds") or 0.0
                if still := facts["kind"] == "picture":
                    (folder.path / "source").unlink()
                else:
                    source_name = "source.mp4"
                    (folder.path / "source").rename(folder.path / source_name)
            elif self.offer.experts == 2:
                raise ApiError(
                    "this server's model makes no video from text alone; send a picture or a video",
                    param="input_reference",
                )
            elif not (given.get("prompt") or (clips and clips[0].get("prompt"))):
                raise ApiError("a video from text alone needs a prompt", param="prompt")
            else:
                Image.new("RGB", self.offer.pixels(given), (110, 110, 110)).save(folder.path / source_name)
            names = await take_pictures(folder, pictures)
            scenes = [read_clip(clip, names, number) for number, clip in enumerate(clips, 1)]
            if still:
                first = {"cut": source_name if source is not None else True, **(scenes[0] if scenes else {})}
                scenes = [first, *scenes[1:]]
                if source is None and not first.get("prompt"):
                    first["prompt"] = given["prompt"]
            folder.write_clips(scenes or [{}])  # a run reads it again before each clip only if it is there at first
            count = int(given.pop("num_videos", None) or max(len(scenes), 1))
            if seconds is not None:
                count = max(self.offer.clips_of(given, seconds, still), len(scenes))
            if whole and not still:
                given["include_source"] = True
            ticket = Ticket(
                id=folder.path.name.removeprefix(".new-"),
                state=DRAFT if draft else QUEUED,
                model=model or self.offer.model,
                prompt=given.get("prompt"),
                title="" if source is None else source.title,
                size=self.offer.size(given).replace("*", "x"),
                settings=given,
                source=source_name,
                still=still,
                count=count,
                seconds=self.offer.seconds_of(given, count, still) + (source_seconds if whole else 0.0),
            )
            self.offer.check(ticket, scenes)
            return self._add(ticket, folder)

    async def extend(self, before: Ticket, prompt: str, seconds: float | None, clips: int | None = None) -> Ticket:
        """A new chain that begins with all of a finished one, and goes on from its last clip as it is in memory.

        Raises ApiError.
        """
        old = self.folders[before.id]
        if before.state != DONE:
            raise ApiError(f"the video is {before.state}; only a completed one can be extended", param="video")
        self.check_queue()
        more = clips or (1 if seconds is None else self.offer.clips_of(dict(before.settings), seconds, False))
        async with self.folders.new() as folder:
            await asyncio.to_thread(link_inputs, old, folder)
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
                extends=before.id,
                remixed_from=None,
                completed_at=None,
                error=None,
                again=False,
                attempts=0,
                seconds=before.seconds + self.offer.seconds_of(dict(before.settings), more, False),
            )
            self.offer.check(ticket, scenes)
            return self._add(ticket, folder)

    async def remix(self, before: Ticket, prompt: str) -> Ticket:
        """The same chain with another prompt; of an extension its own clips. Raises ApiError."""
        old = self.folders[before.id]
        self.check_queue()
        async with self.folders.new() as folder:
            await asyncio.to_thread(link_inputs, old, folder)
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
                remixed_from=before.id,
                completed_at=None,
                error=None,
                again=False,
                attempts=0,
            )
            self.offer.check(ticket, scenes)
            return self._add(ticket, folder)

    def check_queue(self) -> None:
        """Raise ApiError while no other chain may wait."""
        if (waiting := self.queue.counts()[QUEUED]) >= self.most_waiting:
            raise ApiError(
                f"{waiting} chains are waiting already; try again later",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "60"},
            )

    def _add(self, ticket: Ticket, folder: ChainFolder) -> Ticket:
        self.folders.keep(folder, ticket.id)
        try:
            added = self.queue.add(ticket)
        except Exception:
            self.folders.remove(ticket.id)
            raise
        self.wake()
        return added
