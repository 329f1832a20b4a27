"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gossamer.protocol import ChatCompletionRequest, CompletionRequest
from gossamer.server.documented import errors, json_body
from gossamer.server.http import EventStream, read_json, while_connected
from gossamer.server.service import Service

router = APIRouter(tags=["completions"])
_ERRORS = errors(400, 404, 408, 413, 415, 429, 500, 504)
_STREAM = {"description": "The answer, or its events.", "content": {"application/json": {}, "text/event-stream": {}}}


@router.post("/v1/completions", responses={200: _STREAM, **_ERRORS}, openapi_extra=json_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """Complete one or several prompts."""
    return await _answer(request, CompletionRequest, "prompt")


@router.post(
    "/v1/chat/completions", responses={200: _STREAM, **_ERRORS}, openapi_extra=json_body(ChatCompletionRequest)
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _answer(request, ChatCompletionRequest, "messages")


async def _answer(
    request: Request, kind: type[CompletionRequest] | type[ChatCompletionRequest], prompt_field: str
) -> Response:
    service: Service = request.app.state.service
    answering = service.ready.answering
    body = kind.parse(await read_json(request))
    service.check_model(body.model)
    timeout = service.options.request_timeout
    if body.stream:
        return EventStream(lambda: answering.stream(body), timeout=timeout, prompt_field=prompt_field)
    return JSONResponse(await while_connected(request.receive, answering.complete(body), timeout))
