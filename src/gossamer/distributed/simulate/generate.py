"""Traces from a few numbers: questions about popular prefixes, and conversations of agents.

All are drawn from seeded generators: the same arguments give the same trace, whatever the process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from gossamer.distributed.simulate.trace import Trace, TraceRequest
from gossamer.errors import ConfigurationError

_MASK = (1 << 64) - 1
ODD = 0x9E3779B97F4A7C15  # its multiples differ modulo 2^64


def key_of(*numbers: int) -> int:
    """A hash of 64 bit that stands for these numbers, in their order (SplitMix64 over each)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} must be positive, got {value}")


def zipf_trace(
    *,
    requests: int,
    rate: float,
    prefixes: int,
    exponent: float = 1.0,
    prefix_tokens: int = 2000,
    suffix_tokens: int = 32,
    output_tokens: int = 32,
    head_tokens: int = 0,
    block_tokens: int | None = None,
    seed: int = 0,
) -> Trace:
    """Open loop: questions about prefixes, the k-th most popular of which is asked for in proportion to k^-exponent.

    Args:
        requests, rate: how many, at so many per second on average (Poisson).
        prefixes: how many there are.
        prefix_tokens, suffix_tokens, output_tokens: lengths; suffixes are all different.
        head_tokens: at the beginning of each prefix, the same in all of them.
        block_tokens: per hash; by default an eighth of a prefix.

    Raises:
        ConfigurationError: a number is not positive, or the head is as long as the prefixes.
    """
    _check(requests=requests, rate=rate, prefixes=prefixes, prefix_tokens=prefix_tokens)
    _check(suffix_tokens=suffix_tokens, output_tokens=output_tokens)
    if not 0 <= head_tokens < prefix_tokens:
        raise ConfigurationError(f"head_tokens must be from 0 to {prefix_tokens - 1}, got {head_tokens}")
    block = block_tokens or max(prefix_tokens // 8, 1)
    _check(block_tokens=block)
    blocks, common = prefix_tokens // block, head_tokens // block
    weights = np.arange(1, prefixes + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights / weights.sum())

    class Requests:
        def __iter__(self) -> Iterator[TraceRequest]:
            rng, now = np.random.default_rng(seed), 0.0
            heads = [key_of(i) for i in range(common)]
            for start in range(0, requests, 65536):
                count = min(65536, requests - start)
                waits = rng.exponential(1 / rate, count).tolist()
                drawn = np.searchsorted(cumulative, rng.random(count), side="right").clip(max=prefixes - 1).tolist()
                for number, (wait, prefix) in enumerate(zip(waits, drawn, strict=True), start=start):
                    now += wait
                    own = key_of(prefix, 1)
                    chain = (*heads, *[(own + i * ODD) & _MASK for i in range(common, blocks)])
                    yield TraceRequest(now, chain, prefix_tokens + suffix_tokens, output_tokens, str(number))

    return Trace(Requests(), block, prefix_tokens + suffix_tokens + output_tokens)


def agent_trace(
    *,
    conversations: int,
    rate: float,
    turns: int = 8,
    system_tokens: int = 1024,
    systems: int = 4,
    tool_tokens: int = 256,
    output_tokens: int = 64,
    think_seconds: float = 2.0,
    block_tokens: int = 16,
    seed: int = 0,
) -> Trace:
    """Conversations that begin with one of a few system prompts and grow by an answer and a tool's result each turn.

    Args:
        conversations, rate: how many, of which so many begin per second on average (Poisson).
        turns: on average (geometric).
        system_tokens, systems: length of the system prompts, and how many there are.
        tool_tokens, output_tokens: on average, of what a tool returns and of an answer (exponential).
        think_seconds: on average, from the end of an answer to the next turn (exponential).
        block_tokens: per hash.

    Raises:
        ConfigurationError: a number is not positive.
    """
    _check(conversations=conversations, rate=rate, turns=turns, system_tokens=system_tokens, systems=systems)
    _check(tool_tokens=tool_tokens, output_tokens=output_tokens, think_seconds=think_seconds, block_tokens=block_tokens)

    def requests() -> Iterator[TraceRequest]:
        rng, now = random.Random(seed), 0.0
        for number in range(conversations):
            now += rng.expovariate(rate)
            system, length = rng.randrange(systems), system_tokens
            keys: list[int] = []
            before: str | None = None
            count = 1
            while rng.random() > 1 / turns:
                count += 1
            for turn in range(count):
                length += 1 + round(rng.expovariate(1 / tool_tokens))
                output = 1 + round(rng.expovariate(1 / output_tokens))
                for i in range(len(keys), (length + output) // block_tokens):
                    common = (i + 1) * block_tokens <= system_tokens
                    keys.append(key_of(system, i, 2) if common else key_of(number, i, 3))
                name = f"{number}.{turn}"
                wait = now if before is None else rng.expovariate(1 / think_seconds)
                yield TraceRequest(wait, tuple(keys), length, output, name, before)
                length, before = length + output, name

    made = list(requests())
    return Trace(made, block_tokens, max(each.prompt_tokens + each.output_tokens for each in made), dependent=True)
