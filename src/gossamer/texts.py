"""Texts to measure on, and how they are cut into tokens: Python's language reference, or a file.

Nothing here needs PyTorch until tokens are cut into windows.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


def reference_topics() -> list[str]:
    """The chapters of the language reference that comes with Python."""
    from pydoc_data import topics  # half a megabyte

    return [topics.topics[name] for name in sorted(topics.topics)]


@cache
def reference_text() -> str:
    """All of them: 465,000 characters."""
    return "\n\n".join(reference_topics())


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
    import torch

    from gossamer.models.quiet import quiet_transformers

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


def prompts_of_one_prefix(tokenizer: Any, prefix: int, suffix: int, count: int) -> list[list[int]]:
    """``count`` prompts of ``prefix`` common tokens and ``suffix`` tokens of their own, all of real text."""
    text = reference_text()
    # 8 characters per token are more than enough; encoding all of the text would take seconds
    ids = tokenizer.encode(text[: 8 * (prefix + suffix * count)], add_special_tokens=False)
    while len(ids) < prefix + suffix * count:
        ids = ids + ids
    own = ids[prefix : prefix + suffix * count]
    return [ids[:prefix] + own[i * suffix : (i + 1) * suffix] for i in range(count)]
