"""What clients may ask for: chains that are made, changed, extended and removed. Each is a row and a folder."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan.configs import ModelConfig
from wan.options import Settings
from wan.server.errors import ApiError, not_found
from wan.server.folders import ChainFolder
from wan.server.intake import Intake
from wan.server.jobs import Jobs, Upload, take_pictures
from wan.server.offer import Offer
from wan.server.orders import read_clip, read_settings
from wan.server.planning import plan_of
from wan.server.supervisor import Supervisor
from wan.server.tickets import DRAFT, FAILED, MAKING, PAUSED, QUEUED, Queue, Ticket

DRAFTS_LIVE = 24 * 3600.0  # seconds until a chain that nobody started is removed
SHOWN = (16, 48)  # channels of the latents that a preview can show: `wan.vae.preview.CHANNELS`, without PyTorch


class Chains:
    """The chains of a server below its folder `root`; `owner` are the server's settings, `config` its model's row."""

    def __init__(self, root: Path, owner: Settings, config: ModelConfig, experts: int, queue: Queue) -> None:
        self.root, self.owner, self.queue = root, owner, queue
        self.jobs = root / "jobs"
        self._folders, self.offer = Jobs(self.jobs), Offer(owner, config, experts)
        self.supervisor: Supervisor | None = None
        self.intake = Intake(self._folders, self.offer, queue, owner.max_queue, self._wake)

    # --- looking

    def get(self, name: str) -> Ticket:
        """A chain. Raises ApiError."""
        try:
            return self.queue[name]
        except KeyError as error:
            raise not_found() from error

    def folder(self, name: str) -> ChainFolder:
        """Its folder."""
        return self._folders[name]

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
            "preview": self.offer.config.z_dim in SHOWN,
            "quiet": True,
            "log_file": None,
        }

    # --- changing

    def start(self, name: str) -> Ticket:
        """Let a draft wait for the worker, or a chain that was stopped, or that failed. Raises ApiError."""
        ticket = self.get(name)
        if ticket.state not in (DRAFT, PAUSED, FAILED):
            raise ApiError(f"the chain is {ticket.state}", status=409)
        self.intake.check_queue()
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
        names = await take_pictures(folder, pictures)
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
            fresh = read_clip({key: value for key, value in clip.items() if value is not None}, names, number)
            left = {key: value for key, value in scenes[number - 1].items() if key not in clip}
            scenes[number - 1] = left | fresh
        scenes = scenes[:count]
        changed = dataclasses.replace(ticket, settings=given, count=count, prompt=given.get("prompt", ticket.prompt))
        self.offer.check(changed, scenes)
        live = self.supervisor.audience.get(name) if self.supervisor else None
        now = live.clip if live is not None else 0
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
        scene = dict(clip)
        if scene.get("seed") in (None, ""):
            scene["seed"] = secrets.randbits(31)
        return await self.change(name, clips={number: scene})

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
            self.supervisor.audience.forget(name)
        await asyncio.to_thread(self._folders.remove, name)

    async def plan(self, name: str) -> list[str]:
        """What a chain would be, in lines. Raises ApiError."""
        return await plan_of(self.owner, self.order_of(self.get(name)))

    # --- keeping order

    def tidy(self) -> None:
        """After a start: remove what no row knows, and rows whose folder is gone; what was half made waits again."""
        self.queue.recover()
        known = {ticket.id for ticket in self.queue.all(drafts=True)}
        self._folders.remove_all_but(known)
        for name in known:
            if name not in self._folders:
                self.queue.remove(name)
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

    def _wait_again(self, name: str) -> Ticket:
        ticket = self.queue.wait_again(name)
        self._tell(name, state=QUEUED)
        self._wake()
        return ticket

    def _wake(self) -> None:
        if self.supervisor is not None:
            self.supervisor.wake()

    def _tell(self, name: str, **values: Any) -> None:
        if self.supervisor is not None:
            self.supervisor.audience.tell(name, "state", **values)


def _padded(scenes: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    return [*scenes, *({} for _ in range(count))][:count]
