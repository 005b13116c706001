"""The HTTP app of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from wan import __version__
from wan.configs import ModelConfig
from wan.options import Settings
from wan.server import chain_routes, page_routes, videos
from wan.server.chains import Chains
from wan.server.errors import ApiError
from wan.server.guard import Guard, Keys
from wan.server.metrics import Metrics
from wan.server.supervisor import WORKER, Supervisor
from wan.server.tickets import Queue
from wan.server.wire import as_json


def create_app(
    settings: Settings,
    config: ModelConfig,
    experts: int,
    *,
    key: str | None = None,
    hosts: Iterable[str] | None = None,
    worker: Sequence[str] = WORKER,
    ranks: int = 1,
) -> ASGIApp:
    """The app of a server. Its chains lie in `output_dir`, which must be an absolute path.

    `experts` are the model's denoisers. With `key` clients must send it; `hosts` are the names that it answers to, None
    for all. `worker` is the command of the process that owns the models, and `ranks` how many of them make a chain
    together.
    """
    root = Path(settings.output_dir)
    (root / "jobs").mkdir(parents=True, exist_ok=True, mode=0o700)
    queue = Queue(root / "queue.sqlite3")
    metrics = Metrics()
    chains = Chains(root, settings, config, experts, queue)
    chains.tidy()
    keys = Keys(key, queue.secret())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervisor = chains.supervisor = Supervisor(
            queue, root, as_json(settings), chains.order_of, metrics, worker, ranks
        )
        supervisor.wake()
        tasks = [
            asyncio.create_task(one)
            for one in (supervisor.run(), chain_routes.watch_previews(chains), chains.drop_old_drafts())
        ]
        try:
            yield
        finally:
            supervisor.audience.close()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            queue.close()

    app = FastAPI(
        title="wan-continue",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts of another host
        redoc_url=None,
    )
    app.include_router(videos.router(chains))
    app.include_router(chain_routes.router(chains))
    app.include_router(page_routes.router(chains, keys))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server works, and what the worker does."""
        assert chains.supervisor is not None
        return {"status": "ok", "worker": chains.supervisor.state, "queued": queue.counts()["queued"]}

    @app.get("/metrics")
    async def page() -> Response:
        """What Prometheus reads."""
        for state, count in queue.counts().items():
            metrics.tickets.labels(state).set(count)
        metrics.busy.set(chains.supervisor is not None and chains.supervisor.making is not None)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model of this server, by the names that requests may give it."""
        return {
            "object": "list",
            "data": [{"id": chains.offer.model, "object": "model", "created": 0, "owned_by": "wan"}],
        }

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        wrong = ApiError(
            str(error.detail), status=error.status_code, code="not_found" if error.status_code == 404 else None
        )
        return JSONResponse(wrong.body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse(ApiError(f"{name}: {first['msg']}", param=name).body, 400)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(OSError)
    async def full(request: Request, error: OSError) -> JSONResponse:
        wrong = ApiError(f"the server cannot store that: {error.strerror}", status=507, code="storage")
        return JSONResponse(wrong.body, 507)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError("the server has an error, which its log tells", status=500).body, 500)

    return Guard(app, keys=keys, hosts=hosts, most_bytes=int(settings.max_upload * 2**30), metrics=metrics)
