"""Text from tokens, as they come.

A token need not be a whole number of characters: an emoji may be cut in the middle of its four bytes. Decoding then
ends in U+FFFD, and the text is held back until further tokens complete it. What tokens decode to also depends on those
before them (SentencePiece drops the space in front of the first word), so new tokens are decoded together with a few
earlier ones. These make a short window, so the cost of a token does not grow with the text.
"""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT = 8  # tokens kept in the window: more bytes than the character cut at its left edge may hold
WINDOW = 16  # tokens in the window before it is cut down to the context


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...


class IncrementalDetokenizer:
    """Decodes one sequence, a few tokens at a time.

    The texts returned by :meth:`push` and :meth:`flush`, concatenated, are ``tokenizer.decode`` of all tokens.

    Attributes:
        text: what was returned so far.

    >>> class Utf8:  # one token per byte
    ...     def decode(self, token_ids, *, skip_special_tokens=False):
    ...         return bytes(token_ids).decode(errors="replace")
    >>> detokenizer = IncrementalDetokenizer(Utf8())
    >>> [detokenizer.push([byte]) for byte in "aé".encode()]
    ['a', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._returned = 0  # characters of the decoded window that were returned
        self._held = 0  # tokens since the window last ended with a whole character

    def push(self, token_ids: list[int]) -> str:
        """Append tokens; returns the text they complete."""
        window = self._window + token_ids
        decoded = self._decode(window)
        end = len(decoded)
        if decoded.endswith(REPLACEMENT) and len(token_ids) > 1:
            # Find the whole characters before the incomplete one.
            half = len(token_ids) // 2
            return self.push(token_ids[:half]) + self.push(token_ids[half:])
        self._window = window
        if decoded.endswith(REPLACEMENT):
            self._held += 1
            if self._held <= CONTEXT:
                return ""
            # Too many tokens for one character: the bytes are invalid, except that the last ones may begin another.
            end -= 1
        else:
            self._held = 0
        text = self._return(decoded, end)
        if len(self._window) > WINDOW:
            self._shorten(pending=len(decoded) - end)
        return text

    def flush(self) -> str:
        """At the end: returns what was held back."""
        decoded = self._decode(self._window)
        return self._return(decoded, len(decoded))

    def _shorten(self, pending: int) -> None:
        """Cut the window down to the context, whose last ``pending`` characters were not returned."""
        context = self._window[-CONTEXT:]
        decoded = self._decode(context)
        if decoded:  # special tokens alone would let the next word pass for the first
            self._window = context
            self._returned = max(0, len(decoded) - pending)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _return(self, decoded: str, end: int) -> str:
        text = decoded[self._returned : end]
        self._returned = max(self._returned, end)
        self.text += text
        return text
