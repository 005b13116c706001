"""`/v1/videos` in the shape of OpenAI's API, extensions among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from wan.server.bodies import Body, body_of
from wan.server.chains import Chains
from wan.server.decode import decode
from wan.server.errors import ApiError, not_found
from wan.server.tickets import DONE, DRAFT, FAILED, MAKING, QUEUED, Ticket

_STATUS = {QUEUED: "queued", DONE: "completed", FAILED: "failed"}
_KINDS = {"thumbnail": ("image/webp", "webp"), "spritesheet": ("image/jpeg", "jpg")}
_FILE = {"type": "string", "format": "binary"}


def _body(required: list[str], **properties: Any) -> dict[str, Any]:
    """The body of a request in the OpenAPI page, which FastAPI does not see."""
    schema = {"type": "object", "required": required, "properties": properties}
    return {
        "requestBody": {"content": {kind: {"schema": schema} for kind in ("multipart/form-data", "application/json")}}
    }


_TEXT = {"type": "string"}


def video_of(chains: Chains, ticket: Ticket) -> dict[str, Any]:
    """A chain as OpenAI's video object."""
    report = chains.folder(ticket.id).report() if ticket.done or ticket.state == DONE else {}
    clips = report.get("clips") or []
    common = report.get("common") or {}
    size = (
        f"{common['width']}x{common['height']}" if clips and "width" in common and "height" in common else ticket.size
    )
    return {
        "id": ticket.id,
        "object": "video",
        "created_at": ticket.created_at,
        "completed_at": ticket.completed_at if ticket.state == DONE else None,
        "expires_at": None,
        "error": ticket.error,
        "model": ticket.model,
        "progress": progress(chains, ticket),
        "prompt": ticket.prompt,
        "remixed_from_video_id": ticket.remixed_from,
        "seconds": f"{ticket.seconds:g}",
        "size": size,
        "status": _STATUS.get(ticket.state, "in_progress"),
    }


def progress(chains: Chains, ticket: Ticket) -> int:
    """How much of a chain is made, in percent."""
    if ticket.state == DONE:
        return 100
    live = chains.supervisor.audience.get(ticket.id) if chains.supervisor else None
    share = live.share if live is not None and ticket.state == MAKING and live.clip == ticket.done + 1 else 0.0
    made, wanted = ticket.done - ticket.base + share, ticket.count - ticket.base
    return max(0, min(int(100 * made / max(wanted, 1)), 99))


def router(chains: Chains) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/videos", tags=["videos"])

    @routes.post(
        "",
        openapi_extra=_body(
            ["prompt"],
            prompt=_TEXT,
            model=_TEXT,
            size=_TEXT,
            seconds=_TEXT,
            input_reference=_FILE,
        ),
    )
    async def create(request: Request) -> JSONResponse:
        """Make a video from text, or from a picture or a video that it goes on from."""
        async with body_of(request) as body:
            reference = body.fields.pop("input_reference", None)
            source = body.file("input_reference")
            if reference is not None and source is None:
                raise ApiError("send input_reference as a file: this server fetches nothing", param="input_reference")
            prompt = body.text("prompt", required=True)
            model, seconds = body.text("model"), body.number("seconds")
            settings = {"custom_prompt": "", **body.fields, "prompt": prompt}
            ticket = await chains.intake.create(settings, source=source, model=model, seconds=seconds, whole=False)
        return JSONResponse(video_of(chains, ticket))

    @routes.post("/extensions", openapi_extra=_body(["prompt", "video"], prompt=_TEXT, seconds=_TEXT, video=_FILE))
    async def extend(request: Request) -> JSONResponse:
        """Go on with a video: one of this server, by its id, or a file. The result is the old and the new."""
        async with body_of(request) as body:
            prompt = body.text("prompt", required=True)
            assert prompt is not None
            seconds, source, name = body.number("seconds"), body.file("video"), _id(body)
            if (source is None) == (name is None):
                raise ApiError('video must be a file, or {"id": …}', param="video")
            if name is not None:
                if body.fields:
                    raise ApiError(
                        f"an extension takes no {next(iter(body.fields))[:60]!r}: it keeps the video's settings"
                    )
                ticket = await chains.intake.extend(chains.get(name), prompt, seconds)
            else:
                model = body.text("model")
                settings = {"custom_prompt": "", **body.fields, "prompt": prompt}
                ticket = await chains.intake.create(settings, source=source, model=model, seconds=seconds, whole=True)
                if ticket.still:
                    await chains.remove(ticket.id)
                    raise ApiError("video must be a video; send a picture to v1/videos", param="video")
        return JSONResponse(video_of(chains, ticket))

    @routes.get("")
    async def list_all(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        """The videos, newest first."""
        if not 1 <= limit <= 100:
            raise ApiError("limit must be from 1 to 100", param="limit")
        try:
            tickets = chains.queue.all(after=after, limit=limit + 1, newest_first=order == "desc")
        except KeyError as error:
            raise not_found() from error
        data = [video_of(chains, ticket) for ticket in tickets[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, "has_more": len(tickets) > limit, **ends}

    def known(name: str) -> Ticket:
        ticket = chains.get(name)
        if ticket.state == DRAFT:
            raise not_found()
        return ticket

    @routes.get("/{name}")
    async def retrieve(name: str) -> dict[str, Any]:
        """How far a video is."""
        return video_of(chains, known(name))

    @routes.get("/{name}/content")
    async def content(name: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
        """The video, a picture of it, or many."""
        ticket = known(name)
        if ticket.state != DONE:
            raise ApiError(f"the video is not completed, it is {ticket.state}", status=409, code="video_not_ready")
        path = chains.folder(name).joined
        if not path.is_file():
            raise not_found()
        if variant == "video":
            return FileResponse(path, media_type="video/mp4", filename=f"{name}.mp4", content_disposition_type="inline")
        kind, ending = _KINDS[variant]
        return FileResponse(await picture_of(path, variant, ending), media_type=kind)

    @routes.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Forget a video and its files; one that is being made stops."""
        await chains.remove(name)
        return {"id": name, "object": "video.deleted", "deleted": True}

    @routes.post("/{name}/remix", openapi_extra=_body(["prompt"], prompt=_TEXT))
    async def remix(name: str, request: Request) -> JSONResponse:
        """The same video with another prompt."""
        known(name)
        async with body_of(request) as body:
            prompt = body.text("prompt", required=True)
            assert prompt is not None
            ticket = await chains.intake.remix(chains.get(name), prompt)
        return JSONResponse(video_of(chains, ticket))

    return routes


def _id(body: Body) -> str | None:
    """The id in {"id": …}, which a form writes as video[id] and may write as JSON."""
    video = body.fields.pop("video", None)
    if video is None:
        return None
    if isinstance(video, str) and video.lstrip().startswith("{"):
        body.fields["video"] = video
        video = body.json("video", dict)
    if isinstance(video, str):
        video = {"id": video}
    if not isinstance(video, dict) or set(video) != {"id"} or not isinstance(video["id"], str):
        raise ApiError('video must be a file, or {"id": …}', param="video")
    name: str = video["id"]
    return name


async def picture_of(video: Path, what: str, ending: str) -> Path:
    """A picture of a video, kept next to it until the video changes. Raises ApiError."""
    picture = video.with_name(f".{video.stem}.{what}.{ending}")
    try:
        fresh = picture.stat().st_mtime_ns >= video.stat().st_mtime_ns
    except OSError:
        fresh = False
    if not fresh:
        part = picture.with_name(f"{picture.name}.part")
        await decode(what, video, part)
        part.replace(picture)
    return picture
