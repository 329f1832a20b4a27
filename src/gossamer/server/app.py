"""The application: routes, what is around them, and the life of the service behind them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import gossamer
from gossamer.errors import GossamerError, RequestError
from gossamer.server import routes_batches, routes_cache, routes_conversations, routes_info, routes_playground
from gossamer.server.errors import HttpError, error_response, no_space
from gossamer.server.generating import generating_routes
from gossamer.server.http import Disconnected, client_gone
from gossamer.server.middleware import ApiKeys, Limits, RequestLog
from gossamer.server.options import ServerOptions
from gossamer.server.origins import Origins, server_hosts
from gossamer.server.paths import Paths
from gossamer.server.pooling_routes import pooling_routes
from gossamer.server.service import Service

if TYPE_CHECKING:
    from gossamer import LLM


def create_app(load: Callable[[], LLM], options: ServerOptions) -> FastAPI:
    """The ASGI application.

    Args:
        load: makes the model; called once the server has started, while ``/health`` says that it is loading.
        options: see there.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = Service(load, options)
        starting = asyncio.create_task(service.start())
        yield
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await service.stop()

    app = FastAPI(
        title="Gossamer",
        version=gossamer.__version__,
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # `Paths` does it better
    )
    routers = all_routers()
    for router in routers:
        app.include_router(router)
    surround(app, options, routers)
    return app


def all_routers() -> list[APIRouter]:
    """All that a server of one model answers."""
    modules = (routes_info, routes_batches, routes_cache, routes_conversations, routes_playground)
    return [
        *(each.router for each in modules),
        generating_routes(),
        pooling_routes(),
    ]


def surround(app: FastAPI, options: ServerOptions, routers: Iterable[APIRouter]) -> None:
    """Give an application what stands around its routes, which ``routers`` have among others: limits, keys, the log."""
    app.add_exception_handler(GossamerError, _gossamer_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Disconnected, _disconnected)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    app.add_exception_handler(OSError, _full_disk)
    # The last one added is the first one to see a request.
    app.add_middleware(ApiKeys, keys=options.api_keys, page=routes_playground.PATHS, behind_front=options.behind_front)
    app.add_middleware(
        Origins,
        hosts=server_hosts(options.host, options.allowed_hosts),
        allowed_origins=options.allowed_origins,
    )
    app.add_middleware(Limits, max_body=options.max_body, max_file=options.max_file, idle_timeout=options.idle_timeout)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    routes = [route.path for router in routers for route in router.routes if isinstance(route, Route)]
    app.add_middleware(Paths, routes=routes)
    app.add_middleware(RequestLog)


async def _gossamer_error(request: Request, error: Exception) -> Response:
    request.scope["gossamer.error"] = str(error)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    else:
        message = str(error.detail)
    headers = dict(error.headers or {})
    return error_response(HttpError(error.status_code, message, code="http_error", headers=headers))


async def _invalid_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(RequestError(f"{name}: {first['msg']}", param=name))


async def _full_disk(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    request.scope["gossamer.error"] = str(error)
    return error_response(no_space(error))


async def _disconnected(request: Request, error: Exception) -> Response:
    return client_gone()
