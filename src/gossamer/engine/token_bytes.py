"""The bytes that a token adds to a text.

Tokens are cut from bytes, not from characters: an emoji may be two tokens, or four of one byte each. So a text is
joined from bytes, and becomes characters afterwards. What a token adds depends on whether another precedes it: a
tokenizer of SentencePiece's kind drops the space in front of the first word of a text, and only there.

Two kinds of vocabulary spell bytes: byte-level BPE, with a letter for each byte (the alphabet of GPT-2), and byte
fallback, with a token ``<0xNN>`` for each. All else is asked of the tokenizer itself.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANKS = "Ġ▁"  # as byte-level BPE and SentencePiece spell the one before a word
EACH_BYTE = "gossamer-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that belongs to no character, as SentencePiece decodes."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class TokenBytes:
    """The vocabulary of one tokenizer, as bytes.

    Args:
        tokenizer: a Hugging Face tokenizer, or one of the ``tokenizers`` library.

    Attributes:
        errors: how bytes that are no characters are decoded, as Python's codecs name it.
        unspaced: of a token that is a word behind a blank, the one of the word alone; of others, the token itself.
        is_word: whether a token has a letter or a digit.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"▁Hi": 0, "<0xC3>": 1, "<0xA9>": 2}, [], byte_fallback=True))
    >>> tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    >>> texts = TokenBytes(tokenizer)
    >>> texts.added(None, 0), texts.added(0, 0), texts.added(0, 1)
    (b'Hi', b' Hi', b'\\xc3')
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # the tokenizers library's, if there is one
        parts = _decoder_parts(backend)
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet() if parts and set(parts) <= {"ByteLevel", "Fuse"} else None
        self._byte_tokens = "ByteFallback" in parts
        self._special = _special_ids(tokenizer, backend)
        self._spelling = getattr(backend, "id_to_token", None)
        self._id_of = getattr(backend, "token_to_id", None)
        self._decoder = backend if self._spelling is not None else tokenizer
        # Replaced as the tokenizer itself would: a whole sequence that was cut short is one U+FFFD, or each byte is.
        self.errors = EACH_BYTE if self._byte_tokens else "replace"
        self._bytes_of = lru_cache(None)(self._spelled_bytes)
        self._difference = lru_cache(1 << 16)(self._ask)
        self.unspaced = lru_cache(1 << 16)(self._find_unspaced)
        self.is_word = lru_cache(1 << 16)(lambda token: any(each.isalnum() for each in self.spelling(token)))

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """``tokenizer`` itself if it is one of these."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether a text without special tokens leaves it out."""
        return token in self._special

    def spelling(self, token: int) -> str:
        """How it is written where it adds nothing to a text."""
        return self.added(None, token).decode(errors=self.errors)

    def added(self, previous: int | None, token: int) -> bytes:
        """What ``token`` adds to a text behind the token ``previous``, or as its first one (``None``)."""
        spelled = self._bytes_of(token)
        # A space may be dropped in front of a text, even one that is spelled as a byte.
        if spelled is None or (previous is None and spelled == b" "):
            return self._difference(previous, token)
        return spelled

    def _spelled_bytes(self, token: int) -> bytes | None:
        """The bytes that its spelling names, the same in any place; ``None`` if it names none."""
        spelling = self._spelling(token) if self._spelling is not None else None
        if spelling is None:
            return None
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[letter] for letter in spelling])
            except KeyError:  # an added token, which is written as it is
                return spelling.encode()
        match = _BYTE_TOKEN.fullmatch(spelling) if self._byte_tokens else None
        return None if match is None else bytes.fromhex(match[1])

    def _find_unspaced(self, token: int) -> int:
        spelling = self._spelling(token) if self._spelling is not None else None
        if self._id_of is None or spelling is None or len(spelling) < 2 or spelling[0] not in _BLANKS:
            return token
        found: int | None = self._id_of(spelling[1:])
        return token if found is None else found

    def _ask(self, previous: int | None, token: int) -> bytes:
        """How the text of ``token`` and the one before is longer than that of the one before."""
        if previous is None:
            return self._decode([token]).encode()
        before, both = self._decode([previous]), self._decode([previous, token])
        return (both[len(before) :] if both.startswith(before) else self._decode([token])).encode()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._decoder.decode(ids, skip_special_tokens=False)
        return text


def _decoder_parts(backend: Any) -> list[str]:
    """The types of the steps of a tokenizer's decoder, in order; none if it is unknown."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None or not hasattr(decoder, "__getstate__"):
        return []
    return [step["type"] for step in _steps(json.loads(decoder.__getstate__()))]


def _steps(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for each in decoder["decoders"]:
        yield from _steps(each)


def _special_ids(tokenizer: Any, backend: Any) -> frozenset[int]:
    if hasattr(backend, "get_added_tokens_decoder"):
        return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in byte-level BPE: printable ones for themselves, the others from U+0100 on."""
    letters = sorted(ByteLevel.alphabet())
    own = [ord(letter) for letter in letters if ord(letter) < 0x100]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
