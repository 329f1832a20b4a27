"""The application in front of several models: finds the model that a request names, and hands the request on to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx2
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

import gossamer
from gossamer.errors import RequestError
from gossamer.protocol.decoding import InvalidJsonError, decode_json
from gossamer.server import routes_batches, routes_playground
from gossamer.server.app import all_routers, surround
from gossamer.server.errors import HttpError, not_found
from gossamer.server.forwarding import PassedOn, headers_back, headers_for
from gossamer.server.model_pool import ModelPool, ModelSpec
from gossamer.server.model_process import ProcessEnded
from gossamer.server.options import ServerOptions

_STARTED = int(time.time())
_ONE_MODEL = ("/v1/files", "/v1/batches")


def create_front(specs: Mapping[str, ModelSpec], options: ServerOptions, memory: int) -> FastAPI:
    """The ASGI application.

    Args:
        specs, memory: see :class:`ModelPool`.
        options: of this server, and, but for where they listen, of each model's.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        models = app.state.service = ModelPool(specs, options, memory)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        app.state.client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)
        starting = asyncio.create_task(models.start())
        yield
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await models.stop()
        await app.state.client.aclose()

    app = FastAPI(title="Gossamer", version=gossamer.__version__, lifespan=life, docs_url=None, redoc_url=None,
                  redirect_slashes=False)  # fmt: skip
    app.include_router(_router)
    app.include_router(routes_playground.router)
    app.add_api_route("/{path:path}", _forward, methods=["GET", "POST", "DELETE"], include_in_schema=False)
    surround(app, options, all_routers())
    app.openapi = _described_paths().openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


def _described_paths() -> FastAPI:
    """What can be asked of the models, which this application knows no paths of."""
    app = FastAPI(title="Gossamer", version=gossamer.__version__)
    for router in all_routers():
        if router is not routes_batches.router:
            app.include_router(router)
    return app


_router = APIRouter()


def _models(request: Request) -> ModelPool:
    models: ModelPool = request.app.state.service
    return models


@_router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 as long as requests are taken; models are loaded when they are asked for."""
    models = _models(request)
    if models.state != "ready":
        raise HttpError(503, f"{models.state}: {models.reason}", code="unavailable", type="server_error")
    return {"status": models.state}


@_router.get("/version")
async def version() -> dict[str, str]:
    """The version of the software."""
    return {"version": gossamer.__version__}


@_router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """All models, and which of them are loaded."""
    return {"object": "list", "data": [_described(request, name) for name in _models(request).names]}


@_router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    names = _models(request).names
    name = next((name for name in names if name.strip("/") == model), model)  # of a path, slashes at its ends are gone
    return _described(request, _models(request).find(name))


def _described(request: Request, name: str) -> dict[str, Any]:
    described = {"id": name, "object": "model", "created": _STARTED, "owned_by": "gossamer"}
    return described | _models(request).describe(name)


async def _forward(request: Request) -> Response:
    """Any other request, to the model that it names: in its body, or in the query."""
    path = request.url.path
    if path.startswith(_ONE_MODEL):
        raise not_found(f"a server of several models has no {path}: serve one model, or use gossamer batch")
    body = await request.body()
    named = request.query_params.get("model")
    if named is None and body:
        named = await _named(request, body)
    elif named is None and len(_models(request).names) > 1:
        raise RequestError(f"say which model {path} is about: {path}?model=NAME", param="model")
    return _Forwarded(request, _models(request).find(named), body)


async def _named(request: Request, body: bytes) -> str | None:
    """The field ``model`` of a JSON body. What is wrong with the rest of it, the model's server says."""
    try:
        value = await asyncio.get_running_loop().run_in_executor(_models(request).bodies, decode_json, body, "the body")
    except InvalidJsonError as error:
        raise RequestError(str(error)) from None
    named = value.get("model") if isinstance(value, dict) else None
    if named is not None and not isinstance(named, str):
        raise RequestError("model is the name of a model", param="model")
    return named


class _Forwarded(PassedOn):
    """The answer of a model's server."""

    def __init__(self, request: Request, name: str, body: bytes) -> None:
        super().__init__(_models(request).options.request_timeout)
        self._request, self._name, self._body = request, name, body

    async def _send(self, send: Send) -> None:
        try:
            await self._ask(send)
        except ProcessEnded:
            if self._begun:
                raise
            await self._ask(send)  # its process had ended, and nobody had noticed

    async def _ask(self, send: Send) -> None:
        """Send the request on to the model's process, and its answer back.

        Raises:
            ProcessEnded
        """
        request = self._request
        async with _models(request).use(self._name) as process:
            headers = headers_for(request, process.key)
            path, query = quote(request.scope["path"]), request.scope["query_string"].decode("latin-1")
            url = f"{process.address}{path}{'?' if query else ''}{query}"
            client: httpx2.AsyncClient = request.app.state.client
            asked = client.build_request(request.method, url, headers=headers, content=self._body)
            try:
                response = await client.send(asked, stream=True)
                try:
                    await self._pass_on(response, send)
                finally:
                    await response.aclose()
            except httpx2.TransportError as error:
                if await process.ended():
                    await _models(request).lost(process)
                    raise ProcessEnded(f"the process of the model {self._name!r} has ended") from None
                message = f"the process of the model {self._name!r} does not answer: {type(error).__name__}"
                raise HttpError(502, message, code="bad_gateway", type="server_error") from None

    async def _pass_on(self, response: httpx2.Response, send: Send) -> None:
        headers = headers_back(response.headers.raw)
        self._streamed = response.headers.get("content-type", "").startswith("text/event-stream")
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        self._begun = True
        async for part in response.aiter_raw():
            self._told += part.count(b"\n\n")
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
