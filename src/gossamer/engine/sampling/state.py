"""What the sampler knows of one generated sequence."""

from __future__ import annotations

import copy
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np

from gossamer.engine.grammar import Constraint
from gossamer.engine.reasoning import Reasoning
from gossamer.sampling_params import SamplingParams


def make_random(seed: int | None, engine_seed: int, request_number: int, index: int) -> random.Random:
    """The random stream of completion ``index`` of a request.

    A request with a seed gets the same stream whenever it comes; one without is told apart by its number. Seeding with
    a string hashes it with SHA-512, which is the same in every process.

    >>> make_random(7, 0, 3, 0).random() == make_random(7, 1, 4, 0).random()
    True
    >>> make_random(None, 0, 3, 0).random() == make_random(None, 0, 3, 1).random()
    False
    """
    request = f"engine {engine_seed} request {request_number}" if seed is None else f"seed {seed}"
    return random.Random(f"{request} completion {index}")


class TokenCounts:
    """The tokens that penalties apply to, each once, with the number of times it was generated.

    Kept up to date token by token: counting a long prompt anew in each step would cost more than the step.
    """

    def __init__(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> None:
        self._output = output_token_ids
        self._position = {token: i for i, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._tokens = array("q", self._position)
        self._counts = array("f", bytes(4 * len(self._tokens)))
        self._counted = 0

    def arrays(self, ahead: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64) and how often each was generated (float32, 0 for those of the prompt only).

        ``ahead`` are tokens that count as generated this once.
        """
        for token in self._output[self._counted :]:
            position = self._position.setdefault(token, len(self._tokens))
            if position == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0.0)
            self._counts[position] += 1.0
        self._counted = len(self._output)
        tokens, counts = np.array(self._tokens), np.array(self._counts)
        for token, count in Counter(ahead).items():
            if token in self._position:
                counts[self._position[token]] += count
            else:
                tokens, counts = np.append(tokens, token), np.append(counts, np.float32(count))
        return tokens, counts


class Uniforms:
    """Numbers in [0, 1) from a random stream that may be looked at before they are taken.

    >>> numbers = Uniforms(random.Random(0))
    >>> second = numbers.peek(1)
    >>> numbers.take(1)
    >>> numbers.peek(0) == second
    True
    """

    def __init__(self, stream: random.Random) -> None:
        self._stream = stream
        self._next: list[float] = []

    def peek(self, index: int) -> float:
        """The number that is ``index`` places ahead."""
        while len(self._next) <= index:
            self._next.append(self._stream.random())
        return self._next[index]

    def take(self, count: int) -> None:
        """So many were used."""
        if count:
            self.peek(count - 1)
            del self._next[:count]


@dataclass
class SamplingState:
    """What the sampler knows of one generated sequence.

    Attributes:
        output_token_ids: shared with the engine, which appends to it after each step.
        stop_token_ids: tokens that may not be chosen before ``params.min_tokens``.
        uniforms: of the sequence's own stream; one is used up by each token that is drawn, none by greedy ones.
        ahead: drafted tokens behind the output that the row takes for granted, see :meth:`behind`.
        constraint: the grammar that the sequence follows, if any.
        reasoning: its thoughts, if they are followed.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]
    stream: InitVar[random.Random]
    constraint: Constraint | None = None
    reasoning: Reasoning | None = None
    ahead: Sequence[int] = ()
    penalized: bool = field(init=False)
    plain: bool = field(init=False)  # the token is the argmax of the logits and nothing else is asked for

    def __post_init__(self, stream: random.Random) -> None:
        params = self.params
        self.uniforms = Uniforms(stream)
        bias = dict(params.logit_bias or {})
        self.bias_tokens = np.fromiter(bias, np.int64, len(bias))
        self.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        self.banned_tokens = np.fromiter(sorted(self.stop_token_ids), np.int64, len(self.stop_token_ids))
        self.penalized = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        prompt = self.prompt_token_ids if params.repetition_penalty != 1 else []
        self.counts = TokenCounts(prompt, self.output_token_ids)
        changed = bias or self.penalized or self.constraint is not None
        self.plain = params.greedy and not changed and params.logprobs is None

    def behind(self, drafted: Sequence[int]) -> SamplingState:
        """What is known of the row behind drafted tokens, if they are right. Shares everything with this one."""
        state = copy.copy(self)
        state.ahead = drafted
        return state

    @property
    def uniform(self) -> float:
        """The number that the row's token is drawn with, in [0, 1): the same whether it was drafted or not."""
        return self.uniforms.peek(len(self.ahead))

    @property
    def bans(self) -> bool:
        """Whether stop tokens may not be chosen yet."""
        return len(self.output_token_ids) + len(self.ahead) < self.params.min_tokens and bool(self.stop_token_ids)

    @property
    def adjusts(self) -> bool:
        """Whether a logit of this row is to be changed before a token is chosen."""
        changed = self.penalized or len(self.bias_tokens) > 0 or self.constraint is not None
        return changed or self.held

    @property
    def held(self) -> bool:
        """Whether it is not its logits alone that decide about the next token, though they do about others."""
        return self.bans or self.forced is not None

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if one has to."""
        return None if self.reasoning is None else self.reasoning.forced
