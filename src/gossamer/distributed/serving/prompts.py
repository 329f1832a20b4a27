"""What routing needs to know of a request: the hashes of its prompt, its size, and what it goes on from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from gossamer.distributed.routing.chain import ChainHasher
from gossamer.distributed.routing.rendered import rendered, scope
from gossamer.errors import RequestError
from gossamer.protocol import BODIES, GeneratingBody
from gossamer.protocol.decoding import InvalidJsonError, decode_json
from gossamer.protocol.model_responses import ResponsesRequest
from gossamer.protocol.response_store import ResponseStore

_TAGGED = re.compile(r"[a-z]+_(r[0-9a-f]{8})_[0-9a-f]{32}")
_NOTHING_KEPT = ResponseStore(0).of("")


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """Of one request.

    Attributes:
        chain, size: as for :class:`~gossamer.distributed.routing.policy.PrefixRouter`.
        tag: of the replica that keeps what the request goes on from.
        generates: whether its answer is generated, so that its prompt stays in a cache.
        text: the prompt, for the router of Ray, which wants it.
    """

    chain: tuple[int, ...] = ()
    size: int = 0
    tag: str | None = None
    generates: bool = False
    text: str = ""


def tag_of(text: str) -> str | None:
    """The tag in an id, or in a path that has one."""
    found = _TAGGED.search(text)
    return found[1] if found else None


def draw_of(request_id: str) -> int:
    """A random stream for a request without a seed: the same wherever and however often it is sent."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=7).digest(), "little")


def read_prompt(path: str, raw: bytes, hasher: ChainHasher, model: str, *, keeps_text: bool = False) -> RoutedPrompt:
    """What routing needs to know of a request with this body.

    Raises:
        RequestError: the body cannot be answered; a replica would say the same.
    """
    kind = BODIES.get(path)
    if kind is None:
        return RoutedPrompt(size=len(raw), tag=tag_of(path))
    try:
        body = kind.parse(decode_json(raw, "the body"))
    except InvalidJsonError as error:
        raise RequestError(str(error)) from None
    tag = _goes_on_from(body)
    if tag is None and isinstance(body, ResponsesRequest):
        body.remember(_NOTHING_KEPT)  # it names nothing that a replica keeps, so there is nothing to be missed
    prompts: list[dict[str, Any]] = [] if tag else body.engine_prompts()
    if not prompts:
        return RoutedPrompt(size=len(raw), tag=tag, generates=True)
    texts = [rendered(prompt) for prompt in prompts]
    chain = hasher.chain(texts[0], scope=scope(prompts[0], body.model or model))
    text = texts[0].decode(errors="replace") if keeps_text else ""
    return RoutedPrompt(chain, sum(map(len, texts)), generates=True, text=text)


def _goes_on_from(body: GeneratingBody) -> str | None:
    if not isinstance(body, ResponsesRequest):
        return None
    if body.previous_response_id is not None:
        return tag_of(body.previous_response_id)
    items = body.input if isinstance(body.input, list) else []
    referred = (tag_of(str(item.get("id"))) for item in items if item.get("type") == "item_reference")
    return next((tag for tag in referred if tag), None)
