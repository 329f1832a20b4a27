"""A Hugging Face tokenizer as GGUF describes it: a vocabulary, merges or scores, and the name of its pre-tokenizer.

Two kinds can be told. Byte-level BPE (``gpt2``) lists its merges, and the name of its pre-tokenizer stands for the
regular expression that cuts text into words. SentencePiece's BPE (``llama``) merges the neighbours whose joint piece
has the highest score. Which one a tokenizer is, is decided from the pipeline it runs, not from its class or name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_pre_tokenizers import PRE_TOKENIZERS
from gossamer.models.quiet import quiet_transformers

_SPACE = "\u2581"  # stands for a space in SentencePiece
_MOST_ENDS = 3  # of text, of turn, of message
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# By the expressions of the splits and whether whole words are looked up. The first of several names stands.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3_WORDS,), True): "llama-bpe",
    ((_LLAMA3_WORDS,), False): "llama-bpe",
    ((_QWEN2_WORDS,), False): "qwen2",
}
for _name, _kind in PRE_TOKENIZERS.items():
    if _kind.byte_level:
        _PRE_TOKENIZERS.setdefault((_kind.words, _kind.whole_words), _name)


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: name of the pre-tokenizer.
        tokens: text of each token, by id.
        types: kind of each token.
        merges: pairs, best first, joined by a space; ``gpt2`` only.
        scores: the piece with the highest score is merged first; ``llama`` only.
        space_prefix: whether a space is put before the text; ``llama`` only.
        warnings: where readers will tokenize differently, one sentence each.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None
    warnings: list[str] = field(default_factory=list)


def add_tokenizer(writer: GGUFWriter, directory: Path, config: PreTrainedConfig) -> list[str]:
    """Adds the tokenizer of a checkpoint: vocabulary, special tokens and chat template.

    Returns:
        Where readers will tokenize differently, one sentence each.

    Raises:
        CheckpointError: the tokenizer cannot be read, or has more tokens than the model.
        UnsupportedModelError: GGUF cannot describe it; says what in it is unknown.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error
    vocabulary = describe(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    warnings = _add_special_tokens(writer, tokenizer, config, directory)
    template = tokenizer.chat_template
    if template := template.get("default") if isinstance(template, dict) else template:
        writer.add_chat_template(template)
    return vocabulary.warnings + warnings


def describe(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Vocabulary:
    """Translates a tokenizer.

    Args:
        tokenizer: one that runs on the tokenizers library.
        vocab_size: rows of the model's embedding; ids without a token become unused ones.

    Raises:
        CheckpointError: the tokenizer has ids beyond ``vocab_size``.
        UnsupportedModelError: GGUF cannot describe it; says what in it is unknown.
    """
    if not tokenizer.is_fast:
        _refuse(f"{type(tokenizer).__name__} runs no pipeline that could be looked at")
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    model = pipeline["model"]
    if model["type"] != "BPE":
        _refuse(f"its model is {model['type']}; only BPE can be exported")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        _refuse("its BPE uses dropout, or marks the parts of words")
    if model.get("ignore_merges") and model["byte_fallback"]:
        _refuse("it looks up whole words before it merges (ignore_merges)")
    tokens, types, left_out = _tokens(pipeline, vocab_size, tokenizer.unk_token)
    kind = _sentencepiece if model["byte_fallback"] else _byte_level
    vocabulary = kind(pipeline, tokens, types)
    if left_out:
        vocabulary.warnings.append(f"tokens without an embedding are left out: {', '.join(left_out)}")
    return vocabulary


# --- the two kinds of tokenizers -------------------------------------------------------------------------------------


def _byte_level(pipeline: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    merges = [" ".join(merge) for merge in _merges(pipeline)]
    if not merges or any(merge.count(" ") > 1 for merge in merges):
        _refuse("it has no merges, or merges with spaces in them")
    vocabulary = Vocabulary("gpt2", _pre_tokenizer(pipeline), tokens, types, merges=merges)
    for step in _steps(pipeline["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            _refuse(f"its normalizer is {step['type']}")
        vocabulary.warnings.append(
            "GGUF readers do not join letters and accents that are apart (NFC), as this tokenizer does"
        )
    return vocabulary


def _pre_tokenizer(pipeline: dict[str, Any]) -> str:
    """The name that stands for how a byte-level tokenizer cuts text into words."""
    steps = _steps(pipeline["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        _refuse(f"its pre-tokenizer is {' + '.join(kinds) or 'absent'} or puts a space before the text")
    cuts_words = steps[-1]["use_regex"]
    whole_words = bool(pipeline["model"].get("ignore_merges"))
    if kinds == ["ByteLevel"] and cuts_words and not whole_words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and cuts_words and steps[0]["individual_digits"] and not whole_words:
        return "smollm"
    splits = steps[:-1]
    if splits and set(kinds[:-1]) == {"Split"} and not cuts_words:
        words = tuple(split["pattern"].get("Regex", "") for split in splits)
        plain = all(split["behavior"] == "Isolated" and not split["invert"] for split in splits)
        if plain and (name := _PRE_TOKENIZERS.get((words, whole_words))):
            return name
        lookup = ", and looks up whole words before it merges (ignore_merges)" if whole_words else ""
        _refuse(f"its pre-tokenizer cuts text by {splits}{lookup}, which has no name in GGUF")
    lookup = " that looks up whole words before it merges (ignore_merges), or is" if whole_words else ""
    _refuse(f"its pre-tokenizer is {' + '.join(kinds)}{lookup} with settings that have no name in GGUF")


def _sentencepiece(pipeline: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    prefix = replaces = False
    warnings = []
    for step in _steps(pipeline["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaces = True
        else:
            _refuse(f"its normalizer is {step}")
    for step in _steps(pipeline["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step["split"]:
            replaces = True
            if step["prepend_scheme"] != "never":
                prefix = True
                warnings.append(
                    "GGUF readers put a space before every text; this tokenizer does not if the text begins with one"
                )
        elif not (replaces and step["type"] == "Split" and step["pattern"] == {"String": " "}):
            # (Where spaces have been replaced, there is none left to split at.)
            _refuse(f"its pre-tokenizer is {step}")
    if not replaces:
        _refuse(f"it does not replace spaces by {_SPACE}")
    scores = _scores(pipeline, tokens)
    # Tokens that users define are looked for in the text as it is written.
    tokens = [
        token.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=prefix, warnings=warnings)


def _scores(pipeline: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores under which the best-scored piece is merged first exactly when its pair comes first in the merges.

    That needs all pairs that make one piece to stand together, and every pair whose joint piece exists to be a merge.
    Merges that were made from scores do so.
    """
    pieces: list[str] = []
    pairs = set()
    for left, right in _merges(pipeline):
        pairs.add((left, right))
        if not pieces or pieces[-1] != left + right:
            pieces.append(left + right)
    if len(set(pieces)) < len(pieces):
        _refuse("its merges do not follow an order of pieces")
    vocabulary = pipeline["model"]["vocab"]
    for piece in vocabulary:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs:
                _refuse(f"it never merges {left!r} with {right!r}, although {piece!r} is a token")
    rank = {piece: float(-place) for place, piece in enumerate(pieces, start=1)}
    return [rank.get(token, 0.0) for token in tokens]


def _merges(pipeline: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in pipeline["model"]["merges"]]


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(
    pipeline: dict[str, Any], vocab_size: int, unknown: str | None
) -> tuple[list[str], list[TokenType], list[str]]:
    """Text and kind of each token, and the special tokens that have no embedding."""
    byte_fallback = pipeline["model"]["byte_fallback"]
    vocabulary = pipeline["model"]["vocab"]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    special = {added["id"] for added in pipeline["added_tokens"]}
    if beyond := [number for number in vocabulary.values() if number >= vocab_size and number not in special]:
        raise CheckpointError(f"the tokenizer has the id {max(beyond)}, but the model has only {vocab_size} embeddings")
    for token, number in vocabulary.items():
        if number >= vocab_size:  # a special token, which is left out below
            continue
        tokens[number] = token
        types[number] = TokenType.BYTE if byte_fallback and _is_byte(token) else TokenType.NORMAL
    left_out = []
    for added in pipeline["added_tokens"]:
        number, token = added["id"], added["content"]
        if number >= vocab_size:  # placeholders for images, for example
            left_out.append(token)
            continue
        tokens[number] = token
        types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if byte_fallback and token == unknown:
            types[number] = TokenType.UNKNOWN
    return tokens, types, left_out


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _add_special_tokens(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, directory: Path
) -> list[str]:
    first, last = _frame(tokenizer)
    if any(number is not None and number >= config.vocab_size for number in (first, last)):
        _refuse("it puts a token before or after every text that has no embedding")
    writer.add_add_bos_token(first is not None)
    writer.add_add_eos_token(last is not None)

    def usable(*numbers: int | None) -> list[int]:
        """Those that have an embedding, each once; -1 and the like are no tokens."""
        return list(
            dict.fromkeys(number for number in numbers if number is not None and 0 <= number < config.vocab_size)
        )

    bos = usable(first, tokenizer.bos_token_id, config.bos_token_id)
    ends = usable(last, tokenizer.eos_token_id, *_ends(config.eos_token_id), *_generation_ends(directory))
    for add, numbers in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, ends),
        (writer.add_eot_token_id, ends[1:]),
        (writer.add_eom_token_id, ends[2:]),
        (writer.add_unk_token_id, usable(tokenizer.unk_token_id)),
        (writer.add_pad_token_id, usable(tokenizer.pad_token_id)),
    ):
        if numbers:
            add(numbers[0])
    if len(ends) <= _MOST_ENDS:
        return []
    return [f"GGUF names {_MOST_ENDS} tokens that end a text; readers may go on after {ends[_MOST_ENDS:]}"]


def _ends(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or ())


def _generation_ends(directory: Path) -> list[int]:
    """Ends of text in ``generation_config.json``, where chat models have their ends of turn."""
    try:
        return _ends(json.loads((directory / "generation_config.json").read_text()).get("eos_token_id"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'generation_config.json'} cannot be read: {error}") from error


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The tokens that are put before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for before in (0, 1):
        for after in (0, 1):
            if framed[before : len(framed) - after] == plain and len(framed) == len(plain) + before + after:
                return framed[0] if before else None, framed[-1] if after else None
    _refuse(f"it puts more than one token before or after a text: {framed}")


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be absent, a single one or a sequence."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModelError(f"the tokenizer cannot be exported to GGUF exactly: {reason}")
