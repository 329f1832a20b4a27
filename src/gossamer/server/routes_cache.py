"""``/v1/prefixes``: what is in the cache, and what must stay there."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from gossamer.errors import RequestError
from gossamer.protocol.chat_messages import Messages, ToolField, template_messages, template_tools
from gossamer.protocol.fields import Fields
from gossamer.server.documented import errors, json_body
from gossamer.server.http import parse_body, read_body
from gossamer.server.service import Service

router = APIRouter(tags=["prefixes"])


class PinRequest(Fields, BaseModel):  # BaseModel for ruff, which would take the defaults for shared ones
    """A prefix: a text, token ids, or the first messages of conversations with these tools."""

    model: str | None = None
    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] | None = None
    messages: Messages | None = None
    tools: list[ToolField] = []
    chat_template_kwargs: dict[str, Any] = {}
    name: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


@router.get("/v1/prefixes", responses=errors())
async def list_prefixes(request: Request) -> dict[str, Any]:
    """What is pinned, the nodes of the prefix tree without their texts, and what sharing has saved."""
    service: Service = request.app.state.service
    return await service.ready.prefixes.picture()


@router.post("/v1/prefixes", responses=errors(400, 408, 413, 415, 429, 500), openapi_extra=json_body(PinRequest))
async def pin(request: Request) -> JSONResponse:
    """Compute a prefix now, and keep it until it is unpinned."""
    service: Service = request.app.state.service
    prefixes = service.ready.prefixes
    body = await read_body(request, partial(parse_body, PinRequest))
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    service.check_model(body.model)
    prefix = await prefixes.pin(
        prompt=body.prompt,
        messages=None if body.messages is None else template_messages(body.messages),
        tools=template_tools(body.tools),
        template_kwargs=body.chat_template_kwargs,
        name=body.name,
        cache_salt=body.cache_salt,
        adapter=body.model if body.model in service.ready.answering.llm.adapters else None,
    )
    return JSONResponse(prefix.to_dict())


@router.delete("/v1/prefixes/{prefix_id}", responses=errors(404))
async def unpin(request: Request, prefix_id: str) -> dict[str, Any]:
    """Let a prefix go as soon as its memory is needed."""
    service: Service = request.app.state.service
    await service.ready.prefixes.unpin(prefix_id)
    return {"id": prefix_id, "object": "prefix", "deleted": True}
