"""Completions that follow a grammar: after each token, which tokens may come next.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance): a derivative-based lexer and an Earley parser
walk over a trie of the vocabulary, so that a mask takes tens of microseconds and nothing is compiled ahead.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.errors import InvalidSamplingParamsError, UnsupportedModelError
from gossamer.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMARS = 64  # compiled grammars that are kept
# Blanks in a row in JSON: enough to indent, and too few for a model that has nothing to write to go on with for ever.
WHITESPACE = r"[\x20\x0A\x09]{0,16}"
# Where only one text can come, llguidance would force the tokens that the tokenizer makes of it. That may be a special
# token, if it is spelled like that text, and that one is no text: the answer could not go on. So all tokens compete.
UNFORCED = '%llguidance {"no_forcing": true}\n'


class Constraint:
    """Where one completion stands in its grammar.

    Attributes:
        error: what the grammar's parser gave up over; otherwise empty.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self.error = ""

    def allowed(self) -> np.ndarray:
        """For each token (V, rounded up to whole words) whether it may come next; nothing may after an error."""
        if not self.error:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self.error = self._matcher.get_error()
        if self.error:
            self._mask[:] = 0
        return np.unpackbits(self._mask.view(np.uint8), bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        """The completion goes on with ``token``."""
        self._matcher.consume_token(token)
        self.error = self._matcher.get_error()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can come now."""
        return not self.error and bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes constraints for one tokenizer. Safe to use from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: of the model's logits.
        eos_token_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._trie: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, params: StructuredOutputsParams) -> Constraint:
        """A constraint at its beginning.

        Raises:
            InvalidSamplingParamsError: the schema, pattern or list makes no grammar.
            UnsupportedModelError: the tokenizer cannot be walked through.
        """
        key = json.dumps(params.to_dict())  # the order of a schema's properties is that of the answer
        with self._lock:
            matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compile(params)  # outside of the lock: others need not wait for it
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
            return Constraint(matcher.deep_copy(), self._vocab_size)

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._vocabulary(), _grammar(params), log_level=0)
        except ValueError as error:
            raise InvalidSamplingParamsError(f"structured_outputs: {error}", param="structured_outputs") from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:400]
            raise InvalidSamplingParamsError(f"structured_outputs: {reason}", param="structured_outputs")
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        if self._trie is None:
            from llguidance.hf import from_tokenizer

            try:
                eos = sorted(self._eos_token_ids) or None
                self._trie = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=eos)
            except Exception as error:  # the library raises what it likes over a tokenizer it does not know
                raise UnsupportedModelError(f"this model's tokenizer cannot follow a grammar: {error}") from error
        return self._trie


def _grammar(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if params.regex is not None:
        return _unforced(LLMatcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        return UNFORCED + "start: " + " | ".join(json.dumps(text) for text in params.choice)
    schema = {"type": "object"} if params.json_object else params.json
    return _unforced(
        LLMatcher.grammar_from_json_schema(
            schema if isinstance(schema, str) else json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}
        )
    )


def _unforced(grammar: str) -> str:
    (part,) = json.loads(grammar)["grammars"]
    return UNFORCED + (part["lark_grammar"] or "start: %json " + json.dumps(part["json_schema"]))
