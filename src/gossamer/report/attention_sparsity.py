"""How sparse the attention of a model is on a text, in the sense of Indyk, Kapralov, Sheth and Wagner (2025).

The attention matrix ``exp(scale q_i . k_j)`` of a head is a Gaussian kernel matrix, up to a factor per row
(:func:`~gossamer.operators.gaussian.assumption.attention_points`). The paper assumes of such matrices that their n
largest entries are not outweighed by the others. As in its experiment, the statistic is that of the full square matrix
K[:i, :i] of the first i tokens. In a decoder, too: what the causal mask or a sliding window leaves out of attention is
counted.

Queries and keys are taken where attention gets them, after rotary embedding and norms, and measured while the model
runs, so that those of one layer are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gossamer.errors import ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.operators.gaussian.assumption import TAUS, AssumptionReport, attention_points, measure_assumption
from gossamer.operators.gaussian.kernel import GaussianKernel
from gossamer.report.token_ids import check_tokens
from gossamer.texts import token_windows

IMPLEMENTATION = "gossamer_observed"  # the value of attn_implementation
PREFIXES = 64  # lengths, evenly spaced

# What makes attention more than a softmax of scaled products: the kernel does not have it, nor PyTorch's attention.
_FOREIGN = {"softcap": "caps its scores", "s_aux": "has attention sinks", "position_bias": "adds a bias to its scores"}


@dataclass(frozen=True)
class HeadSparsity:
    """One query head.

    Attributes:
        layer: number of its attention layer, in order of call.
        head: its number within the layer.
        report: of its kernel matrix.
    """

    layer: int
    head: int
    report: AssumptionReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; of the prefixes, those that depend on their length in an interesting way."""
        report, largest = self.report, self.report.largest
        return {
            "layer": self.layer,
            "head": self.head,
            "largest_ratio": largest.ratio,
            "largest_ratio_at": largest.n,
            "ratio": report.ratio,
            "ratio_error": report.ratio_error,
            "growth": report.growth,
            "sum_per_query": report.sum_per_query,
            "frobenius_per_query": report.frobenius_per_query,
            "effective_support": report.effective_support,
            "light_energy": report.light_energy,
            "by_prefix": {
                name: [getattr(each, name) for each in report.prefixes]
                for name in ("ratio", "sum_per_query", "effective_support")
            },
        }


@dataclass(frozen=True)
class AttentionReport:
    """All query heads of a model, on one text.

    Attributes:
        tokens: of the text.
        prefixes: lengths at which the statistic was taken.
        heads: in order of layers.
    """

    tokens: int
    prefixes: tuple[int, ...]
    heads: tuple[HeadSparsity, ...]

    @property
    def largest(self) -> HeadSparsity:
        """The head with the largest ratio over all prefixes: the figure that the paper reports of a model."""
        return max(self.heads, key=lambda each: each.report.largest.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tokens": self.tokens,
            "prefixes": self.prefixes,
            "largest_ratio": self.largest.report.largest.ratio,
            "taus": TAUS,
            "heads": [each.to_dict() for each in self.heads],
        }


@torch.inference_mode()
def measure_attention(
    model: Any,
    ids: Tensor,
    prefixes: int | Sequence[int] = PREFIXES,
    *,
    centre: bool = True,
    progress: Callable[[int], None] | None = None,
) -> AttentionReport:
    """Measures every query head of a model on one text.

    Args:
        model: a transformers decoder or encoder in evaluation mode, whose attention function can be replaced.
        ids: token ids (T,), without padding.
        prefixes: how many, evenly spaced, or their lengths.
        centre: subtract the mean key of a head from its keys, which softmax does not see.
        progress: called after each head with the number of heads done.

    Raises:
        ConfigurationError: the model cannot take the tokens.
        UnsupportedModelError: its attention is more than a softmax of scaled products.
        GossamerError: it computes values that are not finite.
    """
    check_tokens(ids, model, "the text")
    length = len(ids)
    lengths = _evenly(prefixes, length) if isinstance(prefixes, int) else sorted({*prefixes, length})
    found: list[HeadSparsity] = []
    layer = 0

    def observe(query: Tensor, key: Tensor, scale: float | None) -> None:
        nonlocal layer
        if not (query.isfinite().all() and key.isfinite().all()):
            raise GossamerError(f"queries or keys of attention layer {layer} are not finite; another dtype may help")
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            points = attention_points(query[0, head], key[0, head // group], scale, centre)
            found.append(HeadSparsity(layer, head, measure_assumption(GaussianKernel(*points), lengths)))
            if progress is not None:
                progress(len(found))
        layer += 1

    with _observed(model, observe):
        # The model without its output layer, and without a cache, which would hold the keys of all layers.
        cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        model.base_model(input_ids=ids[None].to(model.device), **cache)
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} does not call the attention function it was given")
    return AttentionReport(length, tuple(lengths), tuple(found))


def text_tokens(tokenizer: Any, text: str, length: int, *, encoder: bool) -> Tensor:
    """The first ``length`` tokens of a text, with the special tokens that the model expects around it.

    Raises:
        ConfigurationError: the text is shorter, or the length is below 2.
    """
    if not encoder:
        return token_windows(tokenizer, text, length, 1)[0]
    if length < 3:
        raise ConfigurationError(f"an encoder's text has at least 3 tokens, two of them special ones; got {length}")
    ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    if len(ids) < length:
        raise ConfigurationError(
            f"the text has {len(ids)} tokens, not {length}; give a longer text or a shorter length"
        )
    return torch.tensor(ids)


def _evenly(count: int, length: int) -> list[int]:
    if count < 1:
        raise ConfigurationError(f"the number of prefixes must be at least 1, got {count}")
    return sorted({math.ceil(length * part / count) for part in range(1, count + 1)})


# --- where queries and keys are seen ---------------------------------------------------------------------------------

Observer = Callable[[Tensor, Tensor, float | None], None]  # query (1, Hq, T, D), key (1, Hkv, T, D), scale

_observer: ContextVar[Observer] = ContextVar("gossamer_observer")


@contextmanager
def _observed(model: Any, observer: Observer) -> Iterator[None]:
    """Attention calls of the model are shown to ``observer`` before they are computed."""
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{type(model).__name__} does not let its attention function be replaced")
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    for name, what in _FOREIGN.items():
        if others.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} {what}, so its attention is no Gaussian kernel")
    _observer.get()(query, key, scaling)
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **others
    )
    return out


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
