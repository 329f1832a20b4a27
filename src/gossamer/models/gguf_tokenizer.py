"""The tokenizer that a GGUF file describes, built so that it gives the token ids that llama.cpp gives.

Two kinds are read. Byte-level BPE (``gpt2``) lists its merges and names its pre-tokenizer. SentencePiece's BPE
(``llama``) gives scores: of all neighbours whose joint piece is a token, those of the highest score are merged first.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_ends import END_TEXTS, end_ids
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

_SPACE = "\u2581"  # stands for a space in SentencePiece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_SPECIAL = (_UNKNOWN, _CONTROL)
# What a file of the kind "llama" means when it does not say.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_SETTINGS_OF_OTHERS = ("precompiled_charsmap", "normalizer.lowercase", "normalizer.strip_accents")


class GGUFVocabulary:
    """Tokens of a file, and which of them mean something.

    Args:
        file: the file.
        rows: of the embedding; there can be no more tokens.

    Attributes:
        tokens: spellings, by id.
        types: GGUF's types of tokens, by id.
        ids: of special tokens, by the name that their key has before ``_token_id``; ids that no token has are left out.
        ends: tokens that end a text, the end of text itself first.

    Raises:
        CheckpointError: tokens are missing, or more than ``rows``, or one is there twice.
        UnsupportedModelError: the kind of tokenizer, or its pre-tokenizer, is unknown.
    """

    def __init__(self, file: GGUFFile, rows: int) -> None:
        self.kind = file.get("tokenizer.ggml.model")
        if self.kind not in ("gpt2", "llama", "gemma4"):
            raise UnsupportedModelError(
                f"{file.path}: its tokenizer is of the kind {self.kind!r} (tokenizer.ggml.model); "
                "those of the kinds gpt2, llama and gemma4 are read"
            )
        tokens = _strings(file, "tokenizer.ggml.tokens")
        if not 0 < len(tokens) <= rows:
            raise CheckpointError(f"{file.path} has {len(tokens)} tokens, but {rows} rows in its embedding")
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        if len(set(self.tokens)) < len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if token in self.tokens[:number])
            raise CheckpointError(f"{file.path} has the token {twice!r} twice")
        self.types = file.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        if len(self.types) < len(tokens):
            raise CheckpointError(f"{file.path} has {len(tokens)} tokens, but types for {len(self.types)}")
        given = {
            key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): file.get(key)
            for key in file.names
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        }
        typed = "tokenizer.ggml.token_type" in file
        defaults = {
            name: number
            for name, number in _SENTENCEPIECE_IDS.items()
            if self.kind == "llama" and number < len(tokens) and (not typed or self.types[number] in _SPECIAL)
        }
        self.ids = {
            name: number
            for name, number in (defaults | given).items()
            if isinstance(number, int) and 0 <= number < len(tokens)
        }
        if not typed:  # special tokens are known by their keys only
            for number in self.ids.values():
                self.types[number] = _CONTROL
        self.ends = end_ids(self.ids, self.tokens)

    def spelling(self, name: str) -> str | None:
        """Of the token that a key names."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    def special(self, name: str) -> str | None:
        """Its spelling, unless it is a token of ordinary text, which would vanish from texts if it were special."""
        ordinary = name in self.ids and self.types[self.ids[name]] == _NORMAL
        return None if ordinary else self.spelling(name)


class _Uncopied:
    """A tokenizer that transformers keeps as it is: its copy of a large one takes as long as making it did."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self._backend


def read_tokenizer(file: GGUFFile, vocabulary: GGUFVocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer of a file.

    Raises:
        CheckpointError: something that it needs is missing or damaged.
        UnsupportedModelError: it asks for something that is unknown here; named in the message.
    """
    for key in _SETTINGS_OF_OTHERS:
        if f"tokenizer.ggml.{key}" in file:
            raise UnsupportedModelError(f"{file.path}: tokenizer.ggml.{key} is unknown for a tokenizer of its kind")
    if file.get("tokenizer.ggml.add_sep_token"):
        raise UnsupportedModelError(f"{file.path}: texts end with a separator (tokenizer.ggml.add_sep_token)")
    begins = True
    if vocabulary.kind == "llama":
        backend = _sentencepiece(file, vocabulary)
    else:
        kind = _pre_tokenizer(file, vocabulary)
        backend, begins = _merging(file, vocabulary, kind), kind.begins
    _add_tokens(backend, file, vocabulary)
    begins = file.get("tokenizer.ggml.add_bos_token", begins)
    bos, eos = vocabulary.spelling("bos"), vocabulary.spelling("eos")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_Uncopied(backend),
        bos_token=bos,
        eos_token=eos,
        unk_token=vocabulary.special("unknown"),
        pad_token=vocabulary.special("padding"),
        add_bos_token=bool(begins) and bos is not None,
        add_eos_token=bool(file.get("tokenizer.ggml.add_eos_token", False)) and eos is not None,
        clean_up_tokenization_spaces=False,
    )
    template = file.get("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def _pre_tokenizer(file: GGUFFile, vocabulary: GGUFVocabulary) -> PreTokenizer:
    name = "gemma4" if vocabulary.kind == "gemma4" else file.get("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{file.path}: its tokenizer cuts text as {name!r} says (tokenizer.ggml.pre), and what that means is not "
            "known here"
        )
    return PRE_TOKENIZERS[name]


def _merging(file: GGUFFile, vocabulary: GGUFVocabulary, kind: PreTokenizer) -> Tokenizer:
    """BPE with merges in the file."""
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, space, right = merge[1:].partition(" ")  # a space may be the first piece
        if not space:
            raise CheckpointError(f"{file.path}: {merge!r} in tokenizer.ggml.merges is no pair")
        merges.append((merge[:1] + left, right))
    options = {"ignore_merges": kind.whole_words, "byte_fallback": not kind.byte_level}
    backend = Tokenizer(_bpe(file, vocabulary, merges, **options))
    words: list[Any] = [pre_tokenizers.Split(Regex(each), "isolated") for each in kind.words]
    if kind.byte_level:
        words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    if kind.escapes_spaces:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.ByteLevel() if kind.byte_level else _piece_decoder(kind.escapes_spaces, strip=False)
    return backend


def _sentencepiece(file: GGUFFile, vocabulary: GGUFVocabulary) -> Tokenizer:
    """BPE whose merges follow from scores.

    A pair of a piece that is merged earlier comes before one of a piece that is merged later. (llama.cpp decides
    between different pieces of the same score by their places in the text, which merges cannot say.)
    """
    tokens = vocabulary.tokens
    scores = file.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if len(scores) < len(tokens):
        raise CheckpointError(f"{file.path} has {len(tokens)} tokens, but scores for {len(scores)}")
    known = set(tokens)
    merges = [
        (token[:cut], token[cut:])
        for _, token in sorted(zip(scores, tokens, strict=False), key=lambda pair: -pair[0])
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    unknown = vocabulary.special("unknown")
    backend = Tokenizer(_bpe(file, vocabulary, merges, byte_fallback=True, unk_token=unknown, fuse_unk=True))
    escape = normalizers.Replace(" ", _SPACE)
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    # Each stretch of text between two special tokens is given the prefix, as in llama.cpp.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefix else escape
    backend.decoder = _piece_decoder(True, strip=prefix)
    return backend


def _bpe(file: GGUFFile, vocabulary: GGUFVocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            missing = next(piece for piece in (left, right, left + right) if piece not in ids)
            raise CheckpointError(f"{file.path}: its merges name {missing!r}, which is none of its tokens")
    return models.BPE(ids, merges, **options)


def _piece_decoder(escaped: bool, *, strip: bool) -> Any:
    steps: list[Any] = [decoders.Replace(_SPACE, " ")] if escaped else []
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _add_tokens(backend: Tokenizer, file: GGUFFile, vocabulary: GGUFVocabulary) -> None:
    """Tokens that are looked for in a text before it is cut: special ones, and those that users defined."""
    # Files do not say which tokens swallow the blanks behind them; Phi-3's do.
    name = str(file.get("general.name", "")).lower()
    swallows = "phi-3" in name or "phi3" in name
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    special, others = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=False):
        options = {"normalized": False, "rstrip": swallows and token not in keeps}
        if kind in _SPECIAL or token in END_TEXTS:
            special.append(AddedToken(token, special=True, **options))
        elif kind == _USER_DEFINED:
            others.append(AddedToken(token, special=False, **options))
    backend.add_special_tokens(special)
    backend.add_tokens(others)


def _strings(file: GGUFFile, key: str) -> list[str]:
    found = file.get(key)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"{file.path} has no list of texts under {key}")
    return found
