"""The routes of the endpoints that generate text: one for each body class."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gossamer.errors import RequestError
from gossamer.protocol import BODIES, GeneratingBody
from gossamer.server.documented import errors, json_body
from gossamer.server.http import EventStream, read_body, while_connected
from gossamer.server.service import Service

logger = logging.getLogger("gossamer.server")

_ERRORS = errors(400, 404, 408, 413, 415, 429, 500, 504)
_STREAM = {"description": "The answer, or its events.", "content": {"application/json": {}, "text/event-stream": {}}}


def generating_routes() -> APIRouter:
    """A route for each of ``BODIES``."""
    router = APIRouter(tags=["completions"])
    for url, kind in BODIES.items():
        router.add_api_route(
            url,
            _endpoint(kind),
            methods=["POST"],
            name=url.removeprefix("/v1/").replace("/", "_"),
            description=kind.description,
            responses={200: _STREAM, **_ERRORS},
            openapi_extra=json_body(kind),
        )
    return router


def _endpoint(kind: type[GeneratingBody]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        service: Service = request.app.state.service
        answering = service.ready.answering
        body = await read_body(request, kind.parse)
        service.check_model(body.model)
        body.remember(service.responses.of(request.scope.get("gossamer.owner", "")))
        request.scope["gossamer.body"] = body  # for whoever asks, once it is answered, what that took
        if service.options.behind_front and (draw := request.headers.get("x-gossamer-draw", "")).isdecimal():
            body.drawn_from(int(draw))
        timeout = service.options.request_timeout
        headers = _notes(body, service)
        if body.stream:
            return EventStream(lambda: answering.stream(body), timeout=timeout, headers=headers)
        answer = await while_connected(request.receive, answering.complete_json(body), timeout)
        return Response(answer, media_type="application/json", headers=headers)

    return answer


def _notes(body: GeneratingBody, service: Service) -> dict[str, str]:
    """Headers that say what of a body has no effect, or is done in another way than its author may think.

    Raises:
        RequestError: the server is strict, and a field has no effect, or a call is one of a tool that is not offered.
    """
    headers = {}
    if service.options.strict and (calls := body.foreign_calls):
        path, name = next(iter(calls.items()))
        raise RequestError(f"{path} is {name[:80]!r}, which is none of the tools that are offered", param=path)
    if ignored := body.ignored:
        if service.options.strict:
            raise RequestError(f"{ignored[0]} is not supported", param=ignored[0])
        headers["x-gossamer-ignored"] = ", ".join(ignored[:32])
        logger.info("without an effect here: %s", headers["x-gossamer-ignored"])
    chat = service.ready.answering.llm.chat_format
    if chat is not None and not chat.native and body.tool_use() is not None:
        headers["x-gossamer-tools"] = f"described in {chat.tools_stand_in}: the chat template knows none"
    return headers
