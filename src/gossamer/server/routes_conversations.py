"""What goes with ``/v1/responses`` and ``/v1/messages``: answers that are kept, and how many tokens a request has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request

from gossamer.errors import RequestError, ResponseNotFoundError
from gossamer.protocol.messages import MessagesRequest
from gossamer.protocol.model_responses import ResponsesRequest
from gossamer.protocol.response_store import OwnedResponses
from gossamer.server.documented import errors, json_body
from gossamer.server.errors import not_found
from gossamer.server.http import read_body
from gossamer.server.service import Service

router = APIRouter(tags=["conversations"])
_BODY_ERRORS = errors(400, 404, 408, 413, 415)


def _kept(request: Request) -> OwnedResponses:
    service: Service = request.app.state.service
    return service.responses.of(request.scope.get("gossamer.owner", ""))


@router.get("/v1/responses/{response}", responses=errors(400, 404))
async def response(request: Request, response: str, stream: bool = False) -> dict[str, Any]:
    """An answer of ``/v1/responses`` that is kept; it is whole, and cannot be streamed."""
    if stream:
        raise RequestError("stream is not supported: an answer that is kept is whole", param="stream")
    try:
        return _kept(request).response(response)
    except ResponseNotFoundError as error:
        raise not_found(str(error), "response_id") from None


@router.delete("/v1/responses/{response}", responses=errors(404))
async def delete_response(request: Request, response: str) -> dict[str, Any]:
    """Forget it. Requests cannot go on from it any more; those that went on already are kept whole."""
    try:
        _kept(request).delete(response)
    except ResponseNotFoundError as error:
        raise not_found(str(error), "response_id") from None
    return {"id": response, "object": "response", "deleted": True}


@router.get("/v1/responses/{response}/input_items", responses=errors(400, 404))
async def input_items(
    request: Request,
    response: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """The items that an answer had in front of it, of earlier requests too; the newest first by default."""
    try:
        items = _kept(request).input(response)
    except ResponseNotFoundError as error:
        raise not_found(str(error), "response_id") from None
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items, 1) if item["id"] == after]
        if not places:
            raise not_found(f"the response has no item {after[:80]!r}", "after")
        items = items[places[0] :]
    data = items[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(items) > limit} | ends


@router.post("/v1/responses/input_tokens", responses=_BODY_ERRORS, openapi_extra=json_body(ResponsesRequest))
async def count_response(request: Request) -> dict[str, Any]:
    """Tokens of the prompt that a body of ``/v1/responses`` makes."""
    service: Service = request.app.state.service
    answering = service.ready.answering
    body = await read_body(request, ResponsesRequest.parse)
    service.check_model(body.model)
    body.remember(_kept(request))
    return {"object": "response.input_tokens", "input_tokens": await answering.count_tokens(body)}


def _countable(body: Any) -> MessagesRequest:
    return MessagesRequest.parse({"max_tokens": 1} | body if isinstance(body, dict) else body)


@router.post("/v1/messages/count_tokens", responses=_BODY_ERRORS, openapi_extra=json_body(MessagesRequest))
async def count_message(request: Request) -> dict[str, Any]:
    """Tokens of the prompt that a body of ``/v1/messages`` makes; ``max_tokens`` may be left out."""
    service: Service = request.app.state.service
    answering = service.ready.answering
    body = await read_body(request, _countable)
    service.check_model(body.model)
    return {"input_tokens": await answering.count_tokens(body)}
