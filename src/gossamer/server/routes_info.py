"""What the server is and has: health, version, models, metrics, tokens."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

import gossamer
from gossamer.errors import RequestError
from gossamer.protocol.chat_messages import Messages, ToolField, template_messages, template_tools
from gossamer.protocol.encoding import encode_json
from gossamer.protocol.fields import Fields
from gossamer.server.answering import characters_of
from gossamer.server.documented import errors, json_body
from gossamer.server.http import parse_body, read_body
from gossamer.server.service import Service

router = APIRouter(tags=["information"])
_STARTED = int(time.time())


class TokenizeRequest(Fields, BaseModel):  # BaseModel for ruff, which would take the defaults for shared ones
    """A text, or a conversation as the model sees it."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[ToolField] = []
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors())
async def health(request: Request) -> dict[str, str]:
    """200 if requests are answered; 503 while the model is loaded, and at the end."""
    service = _service(request)
    service.check_health()
    return {"status": service.state}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of the software."""
    return {"version": gossamer.__version__}


@router.get("/v1/models", responses=errors())
async def models(request: Request) -> dict[str, Any]:
    """The names that requests may give: those of the one model, and its adapters, whose ``parent`` it is."""
    service = _service(request)
    return {"object": "list", "data": [_model(service, name) for name in service.model_names]}


@router.get("/v1/models/{model:path}", responses=errors(404))
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    names = _service(request).model_names
    name = next((name for name in names if name.strip("/") == model), model)  # of a path, slashes at its ends are gone
    _service(request).check_model(name)
    return _model(_service(request), name)


def _model(service: Service, name: str) -> dict[str, Any]:
    llm = service.ready.llm
    about = {"id": name, "object": "model", "created": _STARTED, "owned_by": "gossamer"}
    parent = {"parent": service.options.model_names[0]} if name in llm.adapters else {}
    served = {"max_model_len": llm.max_model_len, "sampling_defaults": llm.sampling_defaults}
    return about | parent | served


@router.get("/tokenizer_info", responses=errors())
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What clients need to know of the tokenizer that encode texts for it, with vLLM's names."""
    tokenizer = _service(request).ready.llm.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    return {"tokenizer_class": type(tokenizer).__name__} | {name: getattr(tokenizer, name, None) for name in names}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **errors()})
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(_service(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


_TOKEN_ERRORS = errors(400, 404, 408, 413, 415)


@router.post("/tokenize", responses=_TOKEN_ERRORS, openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The token ids of a text or of a conversation."""
    service = _service(request)
    answering = service.ready.answers
    body = await read_body(request, partial(parse_body, TokenizeRequest))
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.messages is not None and not body.add_special_tokens:
        raise RequestError("the chat template decides about special tokens", param="add_special_tokens")
    if body.messages is not None:
        messages = template_messages(body.messages)
        write_chat = partial(answering.chat_ids, messages, template_tools(body.tools), body.chat_template_kwargs)
        ids = await answering.in_worker(write_chat, characters_of(messages))
    elif body.prompt:
        text = body.prompt
        ids = await answering.in_worker(lambda: answering.prompt_ids(text, special=body.add_special_tokens), len(text))
    else:
        ids = []
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": answering.llm.max_model_len,
        "tokens": ids,
    }

    def write() -> bytes:
        return encode_json(answer | ({"token_strs": answering.token_texts(ids)} if body.return_token_strs else {}))

    return Response(await answering.in_worker(write, len(ids)), media_type="application/json")


@router.post("/detokenize", responses=_TOKEN_ERRORS, openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = _service(request)
    answering = service.ready.answers
    body = await read_body(request, partial(parse_body, DetokenizeRequest))
    service.check_model(body.model)
    ids = body.tokens
    answer = await answering.in_worker(lambda: encode_json({"prompt": answering.decode(ids)}), len(ids))
    return Response(answer, media_type="application/json")
