"""The pages: made on the server, with a little script that sends forms and shows what happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment

from wan import __version__
from wan.chain.charts import Chart, drift_charts
from wan.chain.scores import score_of, verdict
from wan.errors import spell
from wan.kinds import Choice, Interval, PromptFor, Switch, TakeOf
from wan.options import GROUPS, Option
from wan.pages import templates
from wan.server.bodies import body_of
from wan.server.chain_routes import chain_of
from wan.server.chains import Chains
from wan.server.errors import ApiError, not_found
from wan.server.folders import PAGE, ChainFolder, stamp
from wan.server.guard import COOKIE, Keys
from wan.server.orders import CLIENT
from wan.server.tickets import DRAFT

_HERE = Path(__file__).parent
_STATIC = {"app.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}
_IN_FORM = ("prompt", "num_videos")  # which have fields of their own
_PARTS = 50  # of pages that are kept


@cache
def _templates() -> Environment:
    made = templates("wan.server", "pages", "wan.chain")
    made.filters["time"] = span
    return made


def span(seconds: float | None) -> str:
    """A length of time."""
    if seconds is None:
        return ""
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def fields(chains: Chains) -> list[dict[str, Any]]:
    """The settings that a client may choose, by the groups of the table."""
    groups = []
    for group in GROUPS:
        rows = [_field(one, chains) for one in CLIENT.values() if one.group == group and one.name not in _IN_FORM]
        rows = [row for row in rows if row["kind"] != "none"]
        if rows:
            groups.append({"name": group, "rows": rows})
    return groups


def _field(one: Option, chains: Chains) -> dict[str, Any]:
    default = getattr(chains.owner, one.name)
    plain = default is not None and not isinstance(default, bool | tuple) and default != ""
    choices: Sequence[str] = ()
    if one.name == "size":
        choices = [size.replace("*", "x") for size in chains.offer.config.sizes]
    elif isinstance(one.kind, Choice):
        choices = one.kind.names
    kind = "select" if choices else "switch" if isinstance(one.kind, Switch) else "text"
    if isinstance(one.kind, TakeOf | PromptFor):  # which the clips' own forms set
        kind = "none"
    return {
        "name": one.name.rstrip("_"),
        "label": one.name.rstrip("_").replace("_", " "),
        "help": spell(one.help, lambda name: name.rstrip("_").replace("_", " ")),
        "default": str(default) if plain else spell(one.unset, lambda name: name) or "off",
        "kind": kind,
        "choices": list(choices),
        "metavar": "LOW HIGH" if isinstance(one.kind, Interval) else one.kind.metavar or "",
    }


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """The curves of what changes from clip to clip, as the report draws them; none of a run without a seam."""
    drift, clips = report.get("drift"), report.get("clips") or ()
    return drift_charts(drift, [clip["number"] for clip in clips]) if drift and len(clips) > 1 else []


def seam_verdict(clip: Mapping[str, Any]) -> str:
    """good, faint or visible; unknown without a score."""
    return verdict(score_of(clip))


def old_runs(root: Path) -> dict[str, Path]:
    """Folders of runs below the server's folder that the commands made, and the folder itself, by their names."""
    runs = {}
    for path in [root, *sorted(root.iterdir())]:
        if (
            path.is_dir()
            and not path.name.startswith(".")
            and (path / PAGE).is_file()
            and (path / "run.json").is_file()
        ):
            runs[path.name] = path
    return runs


def router(chains: Chains, keys: Keys) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)

    def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
        text = (
            _templates()
            .get_template(template)
            .render(
                token=keys.token,
                version=__version__,
                model=chains.offer.model,
                anchors=chains.offer.experts == 2,  # svi2pro is of A14B
                verdict=seam_verdict,
                **values,
            )
        )
        return HTMLResponse(text, status)

    def rows() -> list[dict[str, Any]]:
        tickets = chains.queue.all(limit=100, drafts=True)
        return [chain_of(chains, ticket, full=False) for ticket in tickets if ticket.state != DRAFT]

    @routes.get("/")
    async def start() -> HTMLResponse:
        return page("start.html.jinja", groups=fields(chains), chains=rows(), old=list(old_runs(chains.root)))

    @routes.get("/parts/queue")
    async def queue() -> HTMLResponse:
        return page("queue.html.jinja", chains=rows())

    parts: dict[str, tuple[Any, str]] = {}  # by the chain, with what each was made of

    def facts_of(name: str) -> dict[str, Any]:
        ticket = chains.get(name)
        whole = chain_of(chains, ticket)
        folder = chains.folder(name)
        return {
            "chain": whole,
            "drift": charts(folder.report()),
            "joined": stamp(folder.joined),
            "preview": folder.preview.is_file(),
            "report": (folder.run / PAGE).is_file(),
            "pictures": [path.name for path in sorted(folder.path.glob("picture_*.png"))],
        }

    @routes.get("/chains/{name}")
    async def chain(name: str) -> HTMLResponse:
        try:
            return page("chain.html.jinja", groups=fields(chains), **facts_of(name))
        except ApiError:
            return page("gone.html.jinja", status=404)

    @routes.get("/parts/chains/{name}")
    async def part(name: str) -> HTMLResponse:
        ticket = chains.get(name)
        live = chains.supervisor.audience.get(name) if chains.supervisor else None
        key = (ticket, chains.folder(name).stamps, live and (live.clip, len(live.warnings)))
        if name not in parts or parts[name][0] != key:
            made = page("clips.html.jinja", **facts_of(name))
            parts[name] = key, bytes(made.body).decode()
            while len(parts) > _PARTS:
                del parts[next(iter(parts))]
        return HTMLResponse(parts[name][1])

    @routes.get("/old/{name}")
    async def old(name: str) -> HTMLResponse:
        if name not in (runs := old_runs(chains.root)):
            return page("gone.html.jinja", status=404)
        folder = ChainFolder(runs[name], runs[name])
        return page("old.html.jinja", name=name, report=folder.report())

    @routes.get("/old/{name}/report")
    async def old_report(name: str) -> Response:
        if name not in (runs := old_runs(chains.root)):
            raise not_found("run")
        return FileResponse(runs[name] / PAGE, media_type="text/html; charset=utf-8")

    @routes.get("/old/{name}/content")
    async def old_video(name: str, clip: int | None = None) -> Response:
        if name not in (runs := old_runs(chains.root)):
            raise not_found("run")
        folder = ChainFolder(runs[name], runs[name])
        path = folder.joined if clip is None else folder.video(clip)
        if path is None or not path.is_file():
            raise not_found("clip")
        return FileResponse(path, media_type="video/mp4")

    @routes.get("/login")
    async def login() -> Response:
        return page("login.html.jinja", wrong=False) if keys.needed else RedirectResponse("/", 303)

    @routes.post("/login")
    async def enter(request: Request) -> Response:
        async with body_of(request) as body:
            key = body.text("key") or ""
        if not keys.needed or not keys.fits(key):
            return page("login.html.jinja", status=401, wrong=True)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, keys.session, max_age=30 * 86400, httponly=True, samesite="strict", secure=secure)
        return answer

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in _STATIC:
            raise not_found("file")
        return FileResponse(_HERE / "static" / name, media_type=_STATIC[name])

    return routes
