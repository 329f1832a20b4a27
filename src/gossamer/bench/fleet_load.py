"""Requests for several replicas: streams of completions over one or more addresses, and what came of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gossamer.bench.http_client import Address, Connection, EventSplitter
from gossamer.texts import reference_text

TIMEOUT = 900.0  # seconds of one answer
LETTERS_PER_TOKEN = 8  # more than enough


@dataclass
class Answered:
    """One request.

    Attributes:
        group: of prompts with the same prefix.
        ttft, seconds: until the first and the last token.
        usage: of the answer; ``None`` if it has none.
        error: what it ended with instead of an answer.
    """

    group: int
    ttft: float | None = None
    seconds: float = 0.0
    usage: dict[str, Any] | None = None
    error: str | None = None

    @property
    def computed(self) -> int:
        """Tokens of the prompt that were not cached."""
        used = self.usage or {"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
        return int(used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"])


@dataclass
class Load:
    """Groups of prompts of real text, in shuffled order.

    Attributes:
        groups, each: prefixes, and requests of each.
        prefix, suffix, new: tokens.
        head: characters that all prompts begin with.
        seed: of the order; other seeds have other texts too.
    """

    groups: int
    each: int
    prefix: int
    suffix: int
    new: int
    head: int = 0
    seed: int = 0
    bodies: list[tuple[int, bytes]] = field(default_factory=list)

    def prepare(self, tokenizer: Any, model: str) -> Load:
        """Make the bodies."""
        text = reference_text()
        start = (self.seed * 104_729) % len(text)
        text = text[start:] + text[:start]
        ids = tokenizer.encode(text[: LETTERS_PER_TOKEN * self._tokens], add_special_tokens=False)
        while len(ids) < self._tokens:
            ids = ids + ids[1:]
        head = f"You are a helpful assistant. {text}"[: self.head]
        prompts: list[tuple[int, str]] = []
        for group in range(self.groups):
            prefix = ids[group * self.prefix : (group + 1) * self.prefix]
            for number in range(self.each):
                place = self.groups * self.prefix + (group * self.each + number) * self.suffix
                prompts.append((group, head + tokenizer.decode(prefix + ids[place : place + self.suffix])))
        random.Random(self.seed).shuffle(prompts)
        self.bodies = [(group, self._body(model, prompt)) for group, prompt in prompts]
        return self

    @property
    def _tokens(self) -> int:
        return self.groups * (self.prefix + self.each * self.suffix)

    def _body(self, model: str, prompt: str) -> bytes:
        asked = {"model": model, "prompt": prompt, "max_tokens": self.new, "temperature": 0, "ignore_eos": True}
        return json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode()


def drive(urls: Sequence[str], bodies: Sequence[tuple[int, bytes]], concurrency: int) -> tuple[list[Answered], float]:
    """Send bodies, so many at once, to the addresses in turn. Returns the answers, and the seconds of all."""
    return asyncio.run(_drive([Address.parse(url) for url in urls], bodies, concurrency))


async def _drive(
    addresses: list[Address], bodies: Sequence[tuple[int, bytes]], concurrency: int
) -> tuple[list[Answered], float]:
    waiting = iter(enumerate(bodies))
    answers: list[Answered] = []

    async def client(place: int) -> None:
        connection = Connection(addresses[place % len(addresses)], TIMEOUT)
        for _, (group, body) in waiting:
            answers.append(await ask(connection, group, body))
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(place) for place in range(concurrency)))
    return answers, time.perf_counter() - start


async def ask(connection: Connection, group: int, body: bytes) -> Answered:
    """One request; whatever goes wrong is part of the answer."""
    answer, splitter, start = Answered(group), EventSplitter(), time.perf_counter()
    ended = False

    def take(data: bytes) -> None:
        nonlocal ended
        for event in splitter.feed(data):
            if event == b"[DONE]":
                ended = True
                continue
            content = json.loads(event)
            if "error" in content:
                answer.error = content["error"]["code"]
            elif content.get("usage"):
                answer.usage = content["usage"]
            elif answer.ttft is None:
                answer.ttft = time.perf_counter() - start

    try:
        response = await connection.request("POST", "/v1/completions", body, take)
        if response.status != 200:
            answer.error = f"status {response.status}: {response.body[:200].decode(errors='replace')}"
        elif not ended and answer.error is None:
            answer.error = "broken"
    except (OSError, TimeoutError) as error:
        answer.error = f"broken: {type(error).__name__}"
    answer.seconds = time.perf_counter() - start
    return answer
