"""Prefixes that stay in the cache, and a picture of the cache as a whole."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gossamer.chat import Tool
from gossamer.engine.engine import Engine
from gossamer.errors import ConfigurationError, MemoryBudgetError, RequestError
from gossamer.sampling_params import SamplingParams
from gossamer.server.answering import Answering, characters_of
from gossamer.server.errors import not_found

COMPUTE = SamplingParams(temperature=0, max_tokens=1)
MAX_NODES = 2000  # of the picture


@dataclass(frozen=True, slots=True)
class Prefix:
    """A pinned prefix; ``name`` is its file, or what the client called it."""

    id: str
    name: str | None
    tokens: list[int]
    cache_salt: str | None
    adapter: str | None

    def engine_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.tokens, "cache_salt": self.cache_salt, "adapter": self.adapter}

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "object": "prefix", "name": self.name, "tokens": len(self.tokens)}


class PinnedPrefixes:
    """The prefixes that clients and ``--pin`` have pinned. Each is computed at once."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._pinned: dict[str, Prefix] = {}

    async def pin(
        self,
        *,
        prompt: str | list[int] | None = None,
        messages: list[dict[str, Any]] | None = None,
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> Prefix:
        """Compute a prefix and keep it: a text, token ids, or the first messages of conversations with these tools.

        It is shared among requests of the same salt and adapter.

        One that is pinned already is returned as it is.

        Raises:
            RequestError: it cannot be computed, or not be kept.
        """
        answering = self._answering
        if answering.llm.engine.sharing == "off":
            raise RequestError("this server shares nothing (--sharing off), so nothing can be pinned", param="prompt")
        if messages is not None:
            find = partial(answering.conversation_ids, messages, tools, template_kwargs)
            tokens = await answering.in_worker(find, characters_of(messages))
        elif prompt is not None:
            tokens = await answering.in_worker(lambda: answering.prompt_ids(prompt), len(prompt))
        else:
            raise RequestError("give prompt or messages", param="prompt")
        for known in self._pinned.values():
            if (known.tokens, known.cache_salt, known.adapter) == (tokens, cache_salt, adapter):
                return known
        prefix = Prefix(f"prefix-{uuid.uuid4().hex}", name, tokens, cache_salt, adapter)
        await answering.engine_loop.call(lambda engine: _pin(engine, prefix))
        try:
            # One more token than the prefix, so that all of the prefix is what others can share.
            compute = prefix.engine_prompt() | {"prompt_token_ids": [*tokens, tokens[-1]]}
            await answering.generate(compute, COMPUTE)
        except BaseException:
            await answering.engine_loop.call(lambda engine: engine.unpin(prefix.engine_prompt()))
            raise
        self._pinned[prefix.id] = prefix
        return prefix

    async def pin_file(self, path: Path) -> Prefix:
        """Pin what is in a file: a JSON list of messages if its name ends with ``.json``, otherwise a text.

        Raises:
            ConfigurationError: it cannot be read.
        """
        try:
            text = path.read_text("utf-8")
            messages = json.loads(text) if path.suffix == ".json" else None
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot pin {path}: {error}") from None
        if messages is None:
            return await self.pin(prompt=text, name=path.name)
        valid = isinstance(messages, list) and all(
            isinstance(each, dict) and isinstance(each.get("content"), str) and "role" in each for each in messages
        )
        if not valid or not messages:
            raise ConfigurationError(f'cannot pin {path}: a .json file holds messages, [{{"role", "content"}}, ...]')
        return await self.pin(messages=messages, name=path.name)

    async def unpin(self, prefix_id: str) -> None:
        """Let a prefix go as soon as its memory is needed.

        Raises:
            HttpError: it is not pinned.
        """
        prefix = self._pinned.pop(prefix_id, None)
        if prefix is None:
            raise not_found(f"no prefix {prefix_id!r} is pinned", "prefix_id")
        await self._answering.engine_loop.call(lambda engine: engine.unpin(prefix.engine_prompt()))

    async def picture(self) -> dict[str, Any]:
        """What is pinned, the nodes of the tree, and what sharing has saved. No texts: they may be others'."""
        picture = await self._answering.engine_loop.call(_picture)
        return {"object": "list", "data": [each.to_dict() for each in self._pinned.values()]} | picture


def _pin(engine: Engine, prefix: Prefix) -> None:
    size = len(prefix.tokens) * engine.tree.layout.bytes_per_token
    pinned = sum(len(node) for node in engine.tree if node.pins) * engine.tree.layout.bytes_per_token
    if pinned + size > engine.budget.total // 2:
        raise MemoryBudgetError(
            f"the prefix needs {size / 1e6:,.1f} MB; with {pinned / 1e6:,.1f} MB pinned already that is more than half "
            f"of the memory budget of {engine.budget.total / 1e6:,.1f} MB",
            param="prompt",
        )
    engine.intake.check_length(len(prefix.tokens) + 1, 1, "")
    engine.pin(prefix.engine_prompt())


def _picture(engine: Engine) -> dict[str, Any]:
    tree, stats = engine.tree, engine.stats
    per_token = tree.layout.bytes_per_token
    nodes = []
    total = 0
    for node in tree:
        total += 1
        if total <= MAX_NODES:
            parent = node.parent
            nodes.append(
                {
                    "id": node.serial,
                    "parent": parent.serial if parent is not None and parent.parent is not None else None,
                    "tokens": len(node),
                    "computed": node.computed,
                    "references": node.refs,
                    "pinned": node.pins > 0,
                    "bytes": len(node) * per_token if node.keys is not None else 0,
                }
            )
    return {
        "nodes": nodes,
        "num_nodes": total,
        "running": len(engine.scheduler.active),
        "waiting": len(engine.scheduler.waiting),
        "kv_bytes": engine.budget.used,
        "kv_bytes_total": engine.budget.total,
        "prompt_tokens": stats.prompt_tokens,
        "saved_tokens": stats.saved_tokens,
        "generated_tokens": stats.generated_tokens,
        "steps": stats.steps,
        "shared_steps": stats.shared_steps,
        "disk": None if engine.store is None else {"files": len(engine.store)} | engine.store.stats.to_dict(),
    }
