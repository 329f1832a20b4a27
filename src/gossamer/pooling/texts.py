"""Texts, pairs of texts and token ids, checked before they become work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.errors import InvalidPromptError, PromptTooLongError, RequestError
from gossamer.options import is_integer
from gossamer.surrogates import find_lone_surrogate


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a network reads.

    Attributes:
        ids: of one text, or of a pair.
        types: which text of a pair each token is of; ``None`` where the network does not tell them apart.
    """

    ids: list[int]
    types: list[int] | None = None


class Texts:
    """Turns texts into tokens. Every refusal names the input, as ``input[3]``.

    Args:
        tokenizer: of the model; a copy for each thread.
        vocab_size: token ids are below.
        max_length: tokens of the longest input.
        lower_case: texts are lower-cased first.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, max_length: int, *, lower_case: bool = False) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.lower_case = lower_case

    def encode(self, text: Any, where: str, truncate: int | None = None, *, special: bool = True) -> Tokens:
        """The tokens of a text, or of a list of token ids, which is taken as it is.

        Args:
            text: a string or a list of integers.
            where: its name, for errors.
            truncate: keep so many tokens from its beginning, special ones included; -1 is as many as the model reads.
            special: with the special tokens that the model was trained with.

        Raises:
            InvalidPromptError: it is empty, no text, or has ids that the model does not have.
            PromptTooLongError: the model does not read as many tokens.
            RequestError: ``truncate`` is out of its range.
        """
        most = self._limit(truncate)
        if isinstance(text, str):
            ids = self._tokenize([self._checked(text, where)], most, special)["input_ids"]
        else:
            ids = self.check_ids(text, where)[: most or None]
        self._check_length(ids, where)
        return Tokens(list(ids))

    def encode_pair(self, first: str, second: str, where: str, truncate: int | None = None) -> Tokens:
        """The tokens of two texts that are read together; arguments and errors are those of :meth:`encode`.

        What is too long is cut from the longer of the two.
        """
        most = self._limit(truncate)
        pair = [self._checked(text, where) for text in (first, second)]
        read = self._tokenize(pair, most, True)
        self._check_length(read["input_ids"], where)
        types = read.get("token_type_ids")
        return Tokens(list(read["input_ids"]), None if types is None else list(types))

    def _tokenize(self, texts: list[str], most: int | None, special: bool) -> Any:
        cut = {"truncation": "longest_first", "max_length": most} if most is not None else {"truncation": False}
        pair = {"return_token_type_ids": True} if len(texts) == 2 and self._has_types else {}
        return self.tokenizer(*texts, add_special_tokens=special, verbose=False, **cut, **pair)

    @property
    def _has_types(self) -> bool:
        return "token_type_ids" in self.tokenizer.model_input_names

    def _limit(self, truncate: int | None) -> int | None:
        if truncate is None:
            return None
        if not is_integer(truncate) or truncate < -1 or truncate == 0:
            raise RequestError(
                f"truncate_prompt_tokens must be a number of tokens or -1, got {truncate!r}",
                param="truncate_prompt_tokens",
            )
        if truncate > self.max_length:
            raise RequestError(
                f"truncate_prompt_tokens is {truncate}; this model reads {self.max_length} tokens at most",
                param="truncate_prompt_tokens",
            )
        return self.max_length if truncate == -1 else truncate

    def _checked(self, text: str, where: str) -> str:
        if not isinstance(text, str):
            raise InvalidPromptError(f"{where} must be a text, got {type(text).__name__}", param=where)
        found = find_lone_surrogate(text, where)
        if found is not None:
            raise InvalidPromptError(found.reason, param=where)
        if not text:
            raise InvalidPromptError(f"{where} is empty; give at least one character", param=where)
        return text.lower() if self.lower_case else text

    def check_ids(self, ids: Any, where: str) -> list[int]:
        """``ids`` as a list of token ids of this model, at least one.

        Raises:
            InvalidPromptError
        """
        if not isinstance(ids, Sequence) or isinstance(ids, (bytes, bytearray)):
            raise InvalidPromptError(f"{where} must be a text or a list of token ids", param=where)
        if not ids:
            raise InvalidPromptError(f"{where} is empty; give at least one token", param=where)
        for place, token in enumerate(ids):
            if not is_integer(token) or not 0 <= token < self.vocab_size:
                raise InvalidPromptError(
                    f"{where}[{place}] is {token!r}; token ids of this model are integers from 0 to "
                    f"{self.vocab_size - 1}. Ids of another vocabulary, such as tiktoken's, mean other texts",
                    param=where,
                )
        return list(ids)

    def _check_length(self, ids: Sequence[int], where: str) -> None:
        if not ids:
            raise InvalidPromptError(f"{where} has no tokens", param=where)
        if len(ids) > self.max_length:
            raise PromptTooLongError(
                f"This model's maximum context length is {self.max_length} tokens. However, {where} has {len(ids)} "
                "tokens; truncate_prompt_tokens: -1 would cut it",
                param=where,
            )
