"""Text from tokens, as they come.

A token need not be a whole number of characters: an emoji may be cut in the middle of its four bytes. Its bytes are
held back until further tokens complete the character; so no piece of text ends inside one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gossamer.engine.token_bytes import TokenBytes
from gossamer.outputs import Logprob

# Tokens at the end of a prompt that can hold the bytes of a character that is not complete: three, and the one before.
CONTEXT = 4


class IncrementalDetokenizer:
    """Decodes one sequence, a few tokens at a time.

    The texts returned by :meth:`push` and :meth:`flush`, concatenated, are what the tokens add to the text of the
    prompt. That is ``tokenizer.decode`` of both without that of the prompt, with two differences where bytes make no
    characters. A character that begins in the prompt belongs to the text behind it. And among ``<0xNN>`` tokens only
    the bytes that make no character become U+FFFD, each one, as in SentencePiece; ``tokenizers`` gives up the whole run
    of them, and so would take back what was returned.

    Args:
        tokenizer: a Hugging Face tokenizer, one of the ``tokenizers`` library, or the :class:`TokenBytes` of one.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: the tokens in front of the first one.

    Attributes:
        text: what was returned so far.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"▁Hi": 0, "<0xC3>": 1, "<0xA9>": 2}, [], byte_fallback=True))
    >>> tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    >>> detokenizer = IncrementalDetokenizer(tokenizer)
    >>> [detokenizer.push([token]) for token in (0, 1, 2, 0)]
    ['Hi', '', 'é', ' Hi']
    >>> IncrementalDetokenizer(tokenizer, prompt_token_ids=[0]).push([0])
    ' Hi'
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> None:
        self.text = ""
        self._tokens = TokenBytes.of(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._previous: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._tokens.errors)
        for token in self._last_shown(prompt_token_ids):
            self._append(token)

    @property
    def whole(self) -> bool:
        """Whether no bytes are held back that do not make a character yet."""
        return not self._utf8.getstate()[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """Append tokens; returns the text they complete."""
        text = "".join([self._append(token) for token in token_ids if not self._is_hidden(token)])
        self.text += text
        return text

    def flush(self) -> str:
        """At the end: returns what was held back, as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self.text += text
        return text

    def describe(self, candidates: Mapping[int, Logprob], chosen: int) -> None:
        """Tell candidates for the next token what they would add: the text that each completes, and its own bytes.

        At the beginning of a text all but the ``chosen`` one keep the space that would be dropped there: it tells them
        apart.
        """
        state = self._utf8.getstate()
        for token, logprob in candidates.items():
            if self._is_hidden(token):
                logprob.decoded_token, logprob.token_bytes = self._tokens.spelling(token), b""
                continue
            previous = token if self._previous is None and token != chosen else self._previous
            logprob.token_bytes = self._tokens.added(previous, token)
            logprob.decoded_token = self._utf8.decode(logprob.token_bytes)
            self._utf8.setstate(state)

    def _append(self, token: int) -> str:
        added = self._tokens.added(self._previous, token)
        self._previous = token
        return self._utf8.decode(added)

    def _is_hidden(self, token: int) -> bool:
        return self._skip_special_tokens and self._tokens.is_special(token)

    def _last_shown(self, token_ids: Sequence[int]) -> list[int]:
        last: list[int] = []
        for token in reversed(token_ids):
            if len(last) == CONTEXT:
                break
            if not self._is_hidden(token):
                last.append(token)
        return last[::-1]


def decode(
    tokenizer: Any,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
    unfinished: bool = False,
) -> str:
    """The text of tokens behind a prompt, all at once.

    Args:
        unfinished: tokens follow; leave out the beginning of a character at the end, which belongs to their text.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids)
    detokenizer.push(token_ids)
    if not unfinished:
        detokenizer.flush()
    return detokenizer.text
