"""What a request asks of the sampler. Field names and defaults are vLLM's, so that code carries over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from gossamer.errors import InvalidSamplingParamsError


def _require(condition: bool, param: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidSamplingParamsError(f"{param} must be {expected}, got {_shown(value)}", param=param)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return "a number of too many digits"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What a completion must look like. Give one of these.

    Args:
        json: a JSON Schema, as a mapping or as text: the completion is a JSON document that is valid under it.
        json_object: any JSON object.
        regex: a regular expression that the whole completion matches.
        choice: the completion is one of these texts.
        grammar: a grammar in the Lark of llguidance
            (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). With a ``%llguidance`` line of its
            own, a text that alone can come is spelled in the tokens that the tokenizer makes of it.
        rules: names in ``grammar`` that stand for JSON Schemas, and for each some of these: the first that can be
            enforced is.

    Raises:
        InvalidSamplingParamsError: none or several are given, or one is of the wrong type.

    >>> StructuredOutputsParams(choice=["yes", "no"]).to_dict()
    {'choice': ['yes', 'no']}
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    rules: Mapping[str, Sequence[Mapping[str, Any]]] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.to_dict() if name != "rules"]
        _require(len(given) == 1, "structured_outputs", given, "one of json, json_object, regex, choice and grammar")
        _require(isinstance(self.grammar, str | None), "grammar", self.grammar, "a grammar")
        _require(self.rules is None or self.grammar is not None, "rules", "no grammar", "given with a grammar")
        _require(isinstance(self.json, Mapping | str | None), "json", self.json, "a JSON Schema")
        _require(isinstance(self.json_object, bool), "json_object", self.json_object, "True or False")
        _require(isinstance(self.regex, str | None), "regex", self.regex, "a regular expression")
        if self.choice is not None:
            valid = isinstance(self.choice, Sequence) and not isinstance(self.choice, str) and len(self.choice) > 0
            valid = valid and all(isinstance(text, str) and text for text in self.choice)
            _require(valid, "choice", self.choice, "a list of non-empty strings")

    def to_dict(self) -> dict[str, Any]:
        """What is given."""
        names = ("json", "regex", "choice", "grammar", "rules")
        fields = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in fields.items() if value is not None}
        return given | ({"json_object": True} if self.json_object else {})


@dataclass(frozen=True, kw_only=True)
class ReasoningParams:
    r"""How a completion's thoughts, which come first, are told from what follows; and how long they may be.

    Args:
        begin, end: the texts around them.
        begun: the prompt ends within them.
        max_tokens: once they have so many tokens, ``closing`` comes next, and the completion goes on behind it.
        closing: ends them; holds ``end``.

    Raises:
        InvalidSamplingParamsError: a value is none of these.

    >>> ReasoningParams(max_tokens=64).closing
    '\n</think>\n\n'
    """

    begin: str = "<think>"
    end: str = "</think>"
    begun: bool = False
    max_tokens: int | None = None
    closing: str = "\n</think>\n\n"

    def __post_init__(self) -> None:
        for name in ("begin", "end", "closing"):
            value = getattr(self, name)
            _require(isinstance(value, str) and bool(value), f"reasoning.{name}", value, "a text that is not empty")
        _require(self.end in self.closing, "reasoning.closing", self.closing, f"a text that holds {self.end!r}")
        most = self.max_tokens
        _require(most is None or (_is_int(most) and most >= 0), "reasoning.max_tokens", most, "an integer >= 0 or None")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop.

    Args:
        n: completions per prompt; the prompt is prefilled once for all of them.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches ``top_p``.
        min_p: keep tokens at least ``min_p`` times as probable as the most probable one.
        repetition_penalty: > 1 divides positive (multiplies negative) logits of tokens in the prompt or output
            (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
        presence_penalty: subtracted once from logits of tokens that were generated already.
        frequency_penalty: subtracted once per earlier occurrence in the output.
        logit_bias: token id -> value added to its logit.
        seed: of this request's draws, which are then the same whatever else is in the batch; the probabilities are
            up to rounding, or to the last bit with the option ``batch_invariant``.
        stop: strings that end the completion; the text is cut before them.
        stop_token_ids: tokens that end the completion.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: tokens to generate at most; ``None`` is up to the end of the context. With 0 the prompt is computed,
            and kept in the cache or told its log-probabilities.
        min_tokens: tokens to generate before a stop token may be chosen or a stop string may end the text.
        logprobs: log-probabilities of this many most probable tokens (plus the chosen one) at each position.
        prompt_logprobs: the same for the prompt's tokens; such a prompt is computed anew, not taken from the cache.
        detokenize: fill ``CompletionOutput.text``.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: a form that the completion must have; it may be cut by ``max_tokens`` all the same.
        reasoning: what marks thoughts: their tokens are counted, and may be bounded.
        prediction: what the completion is expected to be, more or less: a text, or token ids. Where it agrees, several
            tokens come in a step; the completion is the same as without it.
        speculation: False computes this request's tokens one per step.

    Raises:
        InvalidSamplingParamsError: a value is out of its range; ``param`` names it.

    >>> SamplingParams(temperature=0, max_tokens=32, stop="\\n").stop
    ('\\n',)
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    reasoning: ReasoningParams | None = None
    prediction: str | Sequence[int] | None = None
    speculation: bool = True

    def __post_init__(self) -> None:
        _require(_is_int(self.n) and self.n >= 1, "n", self.n, "an integer of at least 1")
        _require(
            _is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a number >= 0"
        )
        _require(_is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer >= 1, or 0 or -1 for all")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a number > 0",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, name, value, "in [-2, 2]")
        _require(self.seed is None or _is_int(self.seed), "seed", self.seed, "an integer or None")
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 0),
            "max_tokens",
            self.max_tokens,
            "an integer of at least 0, or None for the rest of the context",
        )
        _require(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer >= 0")
        if self.max_tokens is not None:
            _require(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens ({self.max_tokens})",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 0), name, value, "an integer >= 0 or None")
        form = self.structured_outputs
        _require(
            isinstance(form, StructuredOutputsParams | None), "structured_outputs", form, "StructuredOutputsParams"
        )
        _require(isinstance(self.reasoning, ReasoningParams | None), "reasoning", self.reasoning, "ReasoningParams")
        _require(self.reasoning is None or self.detokenize, "detokenize", self.detokenize, "True with reasoning")
        _require(form is None or not self.ignore_eos, "ignore_eos", True, "False with structured_outputs, which end")
        _require(form is None or self.min_tokens == 0, "min_tokens", self.min_tokens, "0 with structured_outputs")
        self._normalize_collections()

    def _normalize_collections(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens", "speculation"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, Sequence | Set), name, value, "a list, or None")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "non-empty strings")
        _require(self.detokenize or not stop, "detokenize", self.detokenize, "True if there are stop strings")
        ids = tuple(self.stop_token_ids or ())
        _require(all(_is_int(i) and i >= 0 for i in ids), "stop_token_ids", self.stop_token_ids, "token ids >= 0")
        predicted = self.prediction
        listed = isinstance(predicted, Sequence) and all(isinstance(part, str) or _is_int(part) for part in predicted)
        _require(predicted is None or listed, "prediction", predicted, "a text, or a list of token ids")
        if predicted is not None and not isinstance(predicted, str):
            _require(all(_is_int(i) and i >= 0 for i in predicted), "prediction", predicted, "token ids >= 0")
            object.__setattr__(self, "prediction", tuple(predicted))
        given = {} if self.logit_bias is None else self.logit_bias
        expected = "a mapping of token ids >= 0 to finite numbers"
        _require(isinstance(given, Mapping), "logit_bias", given, expected)
        # JSON has only strings for keys; one of more digits is no token id, and Python may refuse to read it
        bias = {int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 20 else k: v for k, v in given.items()}
        valid = all(_is_int(token) and token >= 0 and _is_number(value) for token, value in bias.items())
        _require(valid, "logit_bias", given, expected)
        # The class is frozen so that one object can serve many requests; these are its canonical forms.
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        object.__setattr__(self, "logit_bias", bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search: keep the ``beam_width`` best continuations, scored by ``sum(logprobs) / length ** length_penalty``.

    Raises:
        InvalidSamplingParamsError: a value is out of its range.

    >>> BeamSearchParams(beam_width=4, max_tokens=20).length_penalty
    1.0
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.beam_width) and self.beam_width >= 1, "beam_width", self.beam_width, "an integer >= 1")
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _require(_is_number(self.length_penalty), "length_penalty", self.length_penalty, "a number")
