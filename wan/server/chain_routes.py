"""`/v1/chains`: storyboards, clips, takes, redo, pause, seams, and what happens while it happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from sse_starlette import EventSourceResponse

from wan.server.bodies import Body, body_of
from wan.server.chains import Chains
from wan.server.errors import ApiError, not_found
from wan.server.folders import PAGE, ChainFolder
from wan.server.tickets import MAKING, Ticket
from wan.server.videos import picture_of, progress

_PREVIEW_SECONDS = 0.5  # between two looks at the preview's file
_PING = 15
_OF_A_CLIP = ("prompt", "answers", "seed", "seam", "candidates", "seconds", "start", "length")


def chain_of(chains: Chains, ticket: Ticket, *, full: bool = True) -> dict[str, Any]:
    """A chain as JSON; `full` with its clips."""
    live = chains.supervisor.audience.get(ticket.id) if chains.supervisor else None
    making = live is not None and ticket.state == MAKING
    shown: dict[str, Any] = {
        "id": ticket.id,
        "object": "chain",
        "status": ticket.state,
        "created_at": ticket.created_at,
        "completed_at": ticket.completed_at,
        "error": ticket.error,
        "model": ticket.model,
        "title": ticket.title,
        "prompt": ticket.prompt,
        "size": ticket.size,
        "fps": chains.offer.fps,
        "seconds": ticket.seconds,
        "progress": progress(chains, ticket),
        "clips_asked": ticket.count,
        "clips_finished": ticket.done,
        "extends": ticket.extends,
        "remixed_from": ticket.remixed_from,
        "settings": dict(ticket.settings),
        "now": {
            "clip": live.clip,
            "stage": live.stage,
            "step": live.step,
            "steps": live.steps,
            "seconds_left": live.seconds_left,
        }
        if making and live is not None
        else None,
        "warnings": list(live.warnings) if live is not None else [],
    }
    if full:
        folder = chains.folder(ticket.id)
        shown["clips"] = clips_of(folder, ticket.count)
        shown["drift"] = folder.report().get("drift")
    return shown


def clips_of(folder: ChainFolder, count: int) -> list[dict[str, Any]]:
    """What is known of each clip: what it is to be, and what became of it."""
    scenes, takes, clips = folder.read_clips(), folder.all_takes(), []
    for number in range(1, count + 1):
        clip = folder.made(number)
        clips.append(
            {
                "number": number,
                "finished": bool(clip),
                "said": scenes[number - 1] if number <= len(scenes) else {},
                "takes": sorted(takes.get(number, ())),
                "version": folder.version(number),
                "take": _taken(takes.get(number, {}), clip.get("seed")),
                **{name: clip.get(name) for name in _OF_A_CLIP},
            }
        )
    return clips


def _taken(takes: Mapping[int, Path], seed: Any) -> int | None:
    """Which take the clip is: the one with its seed."""
    return next((take for take, path in takes.items() if path.stem.endswith(f"_seed{seed}")), None)


def router(chains: Chains) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/chains", tags=["chains"])

    def answer(ticket: Ticket) -> JSONResponse:
        return JSONResponse(chain_of(chains, ticket))

    @routes.post("")
    async def create(request: Request) -> JSONResponse:
        """A new chain. In a form: video, pictures, clips (JSON), settings (JSON or fields of their own), start."""
        async with body_of(request) as body:
            clips = body.json("clips", list) or []
            if not all(isinstance(clip, dict) for clip in clips):
                raise ApiError("clips must be a list of objects", param="clips")
            start = body.fields.pop("start", True)
            seconds, model = body.number("seconds"), body.text("model")
            settings = {**(body.json("settings", dict) or {}), **body.fields}
            ticket = await chains.intake.create(
                settings,
                source=body.file("video"),
                pictures=body.files.get("pictures", []),
                clips=clips,
                model=model,
                seconds=seconds,
                draft=start in (False, "false"),
            )
        return JSONResponse(chain_of(chains, ticket), status_code=201)

    @routes.get("")
    async def list_all(limit: int = 100) -> dict[str, Any]:
        """The chains, newest first, without their clips."""
        if not 1 <= limit <= 1000:
            raise ApiError("limit must be from 1 to 1000", param="limit")
        tickets = chains.queue.all(limit=limit, drafts=True)
        return {"object": "list", "data": [chain_of(chains, ticket, full=False) for ticket in tickets]}

    @routes.get("/{name}")
    async def retrieve(name: str) -> JSONResponse:
        """A chain with its clips."""
        return answer(chains.get(name))

    @routes.get("/{name}/plan")
    async def plan(name: str) -> dict[str, Any]:
        """What will be made, how long that takes and how much memory."""
        return {"lines": await chains.plan(name)}

    @routes.post("/{name}/start")
    @routes.post("/{name}/resume")
    async def start(name: str) -> JSONResponse:
        """Let a draft, or a chain that rests or failed, wait for its turn."""
        return answer(chains.start(name))

    @routes.post("/{name}/pause")
    async def pause(name: str) -> JSONResponse:
        """Let a chain rest: after the clip that is being made."""
        return answer(chains.pause(name))

    @routes.patch("/{name}")
    async def change(name: str, request: Request) -> JSONResponse:
        """Other settings, or other things in clips: {"clips": {"3": {"prompt": …}}, "settings": …, "num_videos": …}."""
        async with body_of(request) as body:
            count = body.whole("num_videos")
            ticket = await chains.change(
                name,
                settings=body.json("settings", dict),
                clips=_by_number(body.json("clips", dict) or {}),
                count=count,
                pictures=body.files.get("pictures", []),
            )
            if body.fields:
                raise ApiError(f"{next(iter(body.fields))[:60]!r} cannot be changed")
        return answer(ticket)

    @routes.patch("/{name}/clips/{number}")
    async def change_clip(name: str, number: int, request: Request) -> JSONResponse:
        """What is different in a clip; it and what follows are made again."""
        async with body_of(request) as body:
            ticket = await chains.change(
                name, clips={number: _nothing_is_null(body)}, pictures=body.files.get("pictures", [])
            )
        return answer(ticket)

    @routes.post("/{name}/clips/{number}/redo")
    async def redo(name: str, number: int, request: Request) -> JSONResponse:
        """Make a clip again with another seed, and other things if they are sent."""
        async with body_of(request) as body:
            event = {key: value for key, value in body.fields.items() if value not in (None, "")}
            ticket = await chains.redo(name, number, event)
        return answer(ticket)

    @routes.post("/{name}/clips/{number}/take")
    async def take(name: str, number: int, request: Request) -> JSONResponse:
        """Go on from another take of a clip."""
        async with body_of(request) as body:
            wanted = body.whole("take")
            if wanted is None:
                raise ApiError("take is missing", param="take")
            ticket = await chains.take(name, number, wanted)
        return answer(ticket)

    @routes.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Forget a chain and its files."""
        await chains.remove(name)
        return {"id": name, "object": "chain.deleted", "deleted": True}

    @routes.get("/{name}/clips/{number}/content")
    async def clip(name: str, number: int, take: int | None = None) -> Response:
        """The mp4 of a finished clip, or of one of its takes."""
        return _video(_clip(chains, name, number, take))

    @routes.get("/{name}/clips/{number}/thumbnail")
    async def thumbnail(name: str, number: int, take: int | None = None) -> Response:
        """A picture of a finished clip, or of one of its takes."""
        return FileResponse(
            await picture_of(_clip(chains, name, number, take), "thumbnail", "webp"), media_type="image/webp"
        )

    @routes.get("/{name}/clips/{number}/seam/{frame}")
    async def seam(name: str, number: int, frame: int) -> Response:
        """A frame of the strip across the seam before a clip, from 0."""
        chains.get(name)
        frames = await asyncio.to_thread(chains.folder(name).seam, number)
        if not 0 <= frame < len(frames):
            raise not_found("picture")
        return Response(frames[frame], media_type="image/jpeg")

    @routes.get("/{name}/content")
    async def content(name: str) -> Response:
        """The joined video, as far as it goes."""
        chains.get(name)
        path = chains.folder(name).joined
        if not path.is_file():
            raise not_found()
        return _video(path)

    @routes.get("/{name}/preview")
    async def preview(name: str) -> Response:
        """A picture of the clip that is being made."""
        chains.get(name)
        path = chains.folder(name).preview
        if not path.is_file():
            raise not_found("picture")
        return Response(await asyncio.to_thread(path.read_bytes), media_type="image/webp")

    @routes.get("/{name}/report")
    async def report(name: str) -> Response:
        """The run's report, a page of its own."""
        chains.get(name)
        path = chains.folder(name).run / PAGE
        if not path.is_file():
            raise not_found("report")
        return Response(await asyncio.to_thread(path.read_bytes), media_type="text/html; charset=utf-8")

    @routes.get("/{name}/events")
    async def events(name: str, request: Request) -> Response:
        """Server-sent events: state, stage, step, prompt, preview, clip_started, clip_finished, warning."""
        ticket = chains.get(name)
        last = request.headers.get("last-event-id", "")
        assert chains.supervisor is not None

        async def stream() -> AsyncIterator[dict[str, Any]]:
            # what it is now, for one who comes in the middle
            yield {"event": "state", "data": json.dumps(chain_of(chains, ticket, full=False))}
            assert chains.supervisor is not None
            async for event in chains.supervisor.audience.listen(name, int(last) if last.isdecimal() else 0):
                rest = {key: value for key, value in event.items() if key not in ("id", "event")}
                yield {"id": str(event["id"]), "event": event["event"], "data": json.dumps(rest)}

        return EventSourceResponse(stream(), ping=_PING)

    return routes


async def watch_previews(chains: Chains) -> None:
    """Tell those who listen when the picture of a clip in the making is another, for ever."""
    last: tuple[str, int] | None = None
    while True:
        await asyncio.sleep(_PREVIEW_SECONDS)
        supervisor = chains.supervisor
        if supervisor is None or (name := supervisor.making) is None:
            continue
        try:
            now = name, chains.folder(name).preview.stat().st_mtime_ns
        except OSError:
            continue
        if now != last:
            last = now
            supervisor.audience.tell(name, "preview", version=str(now[1]))


def _clip(chains: Chains, name: str, number: int, take: int | None) -> Any:
    chains.get(name)
    folder = chains.folder(name)
    path = folder.video(number) if take is None else folder.takes(number).get(take)
    if path is None:
        raise not_found("clip")
    return path


def _video(path: Any) -> FileResponse:
    return FileResponse(path, media_type="video/mp4")


def _by_number(clips: dict[str, Any]) -> dict[int, dict[str, Any]]:
    for number, clip in clips.items():
        if not number.isdecimal() or len(number) > 5 or not isinstance(clip, dict):
            raise ApiError('clips must be objects by number: {"3": {…}}', param="clips")
    return {int(number): clip for number, clip in clips.items()}


def _nothing_is_null(body: Body) -> dict[str, Any]:
    """A form cannot say null: an empty field takes a thing out."""
    return {key: None if value == "" else value for key, value in body.fields.items()}
