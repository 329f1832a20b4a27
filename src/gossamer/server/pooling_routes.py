"""The routes of the endpoints that answer with vectors or scores: one for each body class."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gossamer.protocol import POOLING_BODIES, PoolingBody
from gossamer.server.documented import errors, json_body
from gossamer.server.http import read_body, while_connected
from gossamer.server.service import Service

_ERRORS = errors(400, 404, 408, 413, 415, 429, 500, 504)
_ANSWER = {"description": "The answer.", "content": {"application/json": {}}}
#: Where else an endpoint is looked for: by Cohere's clients.
_OTHER_PATHS = {"/v2/rerank": "/v1/rerank"}


def pooling_routes() -> APIRouter:
    """A route for each of ``POOLING_BODIES``."""
    router = APIRouter(tags=["embeddings"])
    for url, kind in POOLING_BODIES.items():
        router.add_api_route(
            url,
            _endpoint(kind),
            methods=["POST"],
            name=url.removeprefix("/v1/"),
            description=kind.description,
            responses={200: _ANSWER, **_ERRORS},
            openapi_extra=json_body(kind),
        )
    for path, url in _OTHER_PATHS.items():
        router.add_api_route(path, _endpoint(POOLING_BODIES[url]), methods=["POST"], include_in_schema=False)
    return router


def _endpoint(kind: type[PoolingBody]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        service: Service = request.app.state.service
        answering = service.ready.pooling
        body = await read_body(request, kind.parse)
        service.check_model(body.model)
        timeout = service.options.request_timeout
        answer = await while_connected(request.receive, answering.complete_json(body), timeout)
        return Response(answer, media_type="application/json")

    return answer
