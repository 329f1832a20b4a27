"""The tokens of a text that goes on after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a text may stand behind, if its first token would melt into the prompt's last: one that melts into neither.
_OTHERS = ("\n", ".", "a")


class EndingEncoder:
    """Encodes texts behind one prompt: as the tokens that ``encode(prompt + ending)`` has more than ``encode(prompt)``.

    A text by itself may get other tokens: SentencePiece puts a space in front of it, which the whole text has not.
    Where the border falls inside a token of the whole text, the tokens are those that the ending has elsewhere.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: its text.

    >>> class Letters:
    ...     def encode(self, text, *, add_special_tokens):
    ...         return [ord(letter) for letter in " " + text]  # with a space in front, as SentencePiece
    >>> EndingEncoder(Letters(), "a").encode("b"), Letters().encode("b", add_special_tokens=False)
    ([98], [32, 98])
    """

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._heads = {text: self._encode(text) for text in (prompt, *_OTHERS)}

    def encode(self, ending: str) -> list[int]:
        """The token ids of ``ending``."""
        for text, head in self._heads.items():
            whole = self._encode(text + ending)
            if whole[: len(head)] == head and len(whole) > len(head):
                return whole[len(head) :]
        return self._encode(ending)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def is_token_list(value: Any) -> bool:
    """Whether ``value`` means token ids: a list of integers, not empty, or a tensor.

    >>> is_token_list([1, 2]), is_token_list(["a"]), is_token_list([])
    (True, False, False)
    """
    if hasattr(value, "tolist"):
        return True
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and _is_integer(next(iter(value), None))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
