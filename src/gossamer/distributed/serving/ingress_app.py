"""The application of the ingress: what it answers itself, and everything else, which replicas answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import gossamer
from gossamer.distributed.serving.passed_on import AnsweredByReplica
from gossamer.distributed.serving.prompts import RoutedPrompt, read_prompt, tag_of
from gossamer.protocol import BODIES
from gossamer.protocol.decoding import SHORT
from gossamer.server import routes_batches, routes_playground
from gossamer.server.app import all_routers, surround
from gossamer.server.errors import HttpError, not_found

if TYPE_CHECKING:
    from gossamer.distributed.serving.ingress import Ingress

_NOT_HERE = ("/v1/files", "/v1/batches")
_router = APIRouter()


def create_ingress_app(ingress: Ingress) -> FastAPI:
    """The ASGI application, with the paths of ``gossamer serve``."""
    app = FastAPI(title="Gossamer", version=gossamer.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = ingress
    app.include_router(_router)
    app.include_router(routes_playground.router)
    app.add_api_route("/{path:path}", _pass_on, methods=["GET", "POST", "DELETE"], include_in_schema=False)
    surround(app, ingress.options, all_routers())
    app.openapi = _described().openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


def _described() -> FastAPI:
    """What can be asked of replicas, which this application knows no paths of."""
    app = FastAPI(title="Gossamer", version=gossamer.__version__)
    for router in all_routers():
        if router is not routes_batches.router:
            app.include_router(router)
    return app


def _ingress(request: Request) -> Ingress:
    ingress: Ingress = request.app.state.service
    return ingress


@_router.head("/health", include_in_schema=False)
@_router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 while there is a replica."""
    _ingress(request).check_ready()
    return {"status": _ingress(request).state, "replicas": len(_ingress(request).fleet.replicas)}


@_router.get("/version")
async def version() -> dict[str, str]:
    """The version of the software."""
    return {"version": gossamer.__version__}


@_router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Those of every replica, with its tag as a label, and those of the routing."""
    from gossamer.distributed.serving.fleet_metrics import fleet_metrics

    text = await fleet_metrics(_ingress(request))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@_router.get("/v1/prefixes")
async def list_prefixes(request: Request) -> dict[str, Any]:
    """What is pinned, and the caches of all replicas."""
    _ingress(request).check_ready()
    return await _ingress(request).pins.picture()


@_router.post("/v1/prefixes")
async def pin(request: Request) -> Response:
    """Keep a prefix in the cache of every replica."""
    _ingress(request).check_ready()
    status, body = await _ingress(request).pins.add(await request.body(), request.headers.get("content-type", ""))
    return JSONResponse(body, status)


@_router.delete("/v1/prefixes/{prefix_id}")
async def unpin(request: Request, prefix_id: str) -> dict[str, Any]:
    """Let a prefix go in the caches of all replicas."""
    _ingress(request).check_ready()
    await _ingress(request).pins.remove(prefix_id)
    return {"id": prefix_id, "object": "prefix", "deleted": True}


async def _pass_on(request: Request) -> Response:
    """Any other request."""
    ingress, path = _ingress(request), request.url.path
    ingress.check_ready()
    if path.startswith(_NOT_HERE):
        raise not_found(f"a server of several replicas has no {path}: use gossamer batch --ray")
    raw = await request.body()
    if path not in BODIES or request.method != "POST":
        return AnsweredByReplica(ingress, request, raw, RoutedPrompt(size=len(raw), tag=tag_of(path)))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Web pages may send other types anywhere without asking first.
        raise HttpError(415, f"content-type must be application/json, got {kind!r}", code="unsupported_media_type")

    def read() -> RoutedPrompt:
        name, keeps_text = ingress.options.model_names[0], ingress.settings.router == "ray"
        return read_prompt(path, raw, ingress.hasher, name, keeps_text=keeps_text)

    if len(raw) <= SHORT:
        return AnsweredByReplica(ingress, request, raw, read())
    return AnsweredByReplica(
        ingress, request, raw, await asyncio.get_running_loop().run_in_executor(ingress.bodies, read)
    )
