"""A text becomes token windows of one length, which the reports are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.models.quiet import quiet_transformers


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigurationError: the file cannot be read, or is not UTF-8.

    Example:
        >>> read_text(Path("/no/such/file.txt"))
        Traceback (most recent call last):
        gossamer.errors.ConfigurationError: cannot read /no/such/file.txt: No such file or directory
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: byte {error.start} is wrong; convert it first") from None


def token_windows(tokenizer: Any, text: str, window: int, count: int | None = None) -> list[Tensor]:
    """Cuts a text into windows that do not overlap; a rest that fills no window is left out.

    The text is tokenized as a whole, without special tokens. Where the tokenizer puts special tokens before a text by
    itself (Gemma's and Llama's BOS), every window begins with them, because such a model has seen no text without.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: as long as you like.
        window: tokens per window, at least 2.
        count: windows at most; all that the text holds by default.

    Returns:
        At least one window, each (window,) int64.

    Raises:
        ConfigurationError: ``window`` or ``count`` is too small, or the text holds no window.
    """
    if window < 2:
        raise ConfigurationError(f"a window needs at least 2 tokens, to predict one from the other; got {window}")
    if count is not None and count < 1:
        raise ConfigurationError(f"the number of windows must be at least 1, got {count}")
    with quiet_transformers():  # which warns of texts longer than the context
        first = _leading_tokens(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = window - len(first)
    if own < 1:
        raise ConfigurationError(
            f"a window of {window} has no room beside the tokenizer's {len(first)} first tokens; use more"
        )
    if len(ids) < own:
        raise ConfigurationError(
            f"the text has {len(ids)} tokens, and a window of {window} needs {own}; "
            "give a longer text or a shorter window"
        )
    starts = range(0, len(ids) - own + 1, own)[:count]
    return [torch.tensor(first + ids[start : start + own]) for start in starts]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(whole[: whole.index(bare[0])])


def check_tokens(ids: Tensor, model: Any, where: str, *, dimensions: tuple[int, ...] = (1,), shortest: int = 1) -> None:
    """Refuses token ids that a model cannot be run on.

    Args:
        ids: what should be token ids.
        model: a transformers causal language model.
        where: how messages name the ids, such as ``"window 3"``.
        dimensions: the numbers of dimensions they may have; the last one is the sequence.
        shortest: fewest tokens of a sequence.

    Raises:
        ConfigurationError: they are too few, longer than the model's context, of another type or shape, or outside the
            vocabulary.
    """
    if ids.dim() not in dimensions or ids.is_floating_point() or ids.is_complex():
        raise ConfigurationError(f"{where} must be integer token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    length = ids.shape[-1]
    if length < shortest or not ids.numel():
        raise ConfigurationError(f"{where} has {length} tokens; at least {shortest} are needed")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ConfigurationError(f"{where} has {length} tokens, and the model's context is {context}: use shorter ones")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ConfigurationError(
            f"{where} holds token id {lowest if lowest < 0 else highest}, and the model's vocabulary has {vocabulary}: "
            "use the model's own tokenizer"
        )
