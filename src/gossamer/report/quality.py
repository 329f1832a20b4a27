"""How well a language model predicts a text, and how far it is from a reference model.

For windows of tokens x_1 ... x_T, with p the model's distribution and q the reference's, over the predicted tokens
x_2 ... x_T of all windows:

    perplexity        exp(mean of -log p(x_t | x_<t))
    perplexity ratio  exp(mean of log q(x_t | x_<t) - log p(x_t | x_<t)): the model's perplexity over the reference's
    KL                mean of sum_v q(v | x_<t) log(q(v | x_<t) / p(v | x_<t)), in nats
    top-1 agreement   share of positions where argmax p = argmax q

Neighbouring tokens are not independent, so the intervals come from a bootstrap over whole windows. It is paired: a
window that is drawn counts for the model and for the reference, so that what makes a text hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, GossamerError
from gossamer.report.token_ids import check_tokens

Interval = tuple[float, float]

CHUNK = 1 << 22  # logits that are converted to fp32 at a time: 16 MB, whatever the vocabulary
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` found. Intervals are 95 % and ``None`` for a single window, which has nothing to resample.

    Attributes:
        windows: how many were evaluated.
        tokens: predicted tokens, of all windows: one less than each window has.
        nll: mean negative log-likelihood of each window, in nats per token.
        perplexity: of all predicted tokens.
        reference_nll: the same of the reference; this and what follows is ``None`` without a reference.
        perplexity_ratio: the model's perplexity over the reference's; 1.01 is one per cent worse.
        kl: KL(reference || model), in nats per token.
        top1_agreement: share of positions where both find the same token most probable.
    """

    windows: int
    tokens: int
    nll: list[float]
    perplexity: float
    perplexity_interval: Interval | None
    reference_nll: list[float] | None = None
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
    top1_agreement: float | None = None
    top1_agreement_interval: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate(
    model: Any,
    windows: Sequence[Tensor],
    reference: Any = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Quality:
    """Measures a model on windows of tokens, alone or against a reference.

    One window at a time goes through the models, so memory holds the logits of one window (twice with a reference).

    Args:
        model: a transformers causal language model in evaluation mode.
        windows: each (T,) token ids, T at least 2.
        reference: a model with the same vocabulary.
        progress: called after each window with the number of windows done and of all.
        resamples: bootstrap samples for the intervals.
        seed: of the bootstrap; the same seed gives the same intervals.

    Raises:
        ConfigurationError: no windows, a window that the model cannot take, or a reference with another vocabulary.
        GossamerError: a model's logits are not finite.
    """
    evaluation = Evaluation(model, reference)
    for number, window in enumerate(windows):
        evaluation.add(window)
        if progress is not None:
            progress(number + 1, len(windows))
    return evaluation.quality(resamples=resamples, seed=seed)


class Evaluation:
    """The same, window by window, for callers that may stop early.

    Args:
        model, reference: as for :func:`evaluate`.

    Attributes:
        windows: how many have been added.

    Raises:
        ConfigurationError: the reference has another vocabulary.
    """

    def __init__(self, model: Any, reference: Any = None) -> None:
        self._model, self._reference = model, reference
        self._sums: list[tuple[int, Tensor]] = []  # per window: predicted tokens, sums over them
        if reference is not None and (own := _vocabulary(model)) != (other := _vocabulary(reference)):
            raise ConfigurationError(
                f"the model's vocabulary has {own} tokens and the reference's {other}; distributions over different "
                "vocabularies cannot be compared"
            )

    @property
    def windows(self) -> int:
        return len(self._sums)

    @torch.inference_mode()
    def add(self, window: Tensor) -> None:
        """Measures one more window, (T,) token ids.

        Raises:
            ConfigurationError: the model cannot take it.
            GossamerError: a model's logits are not finite.
        """
        where = f"window {self.windows}"
        for model in filter(None, (self._model, self._reference)):
            check_tokens(window, model, where, shortest=2)
        logits = window_logits(self._model, window)
        reference = None if self._reference is None else window_logits(self._reference, window)
        sums = _sums(logits, window[1:].to(logits.device), reference)
        if not sums.isfinite().all():
            raise GossamerError(
                f"the logits for {where} are not finite, or give a token of the text no chance; another dtype may help"
            )
        self._sums.append((len(window) - 1, sums))

    def quality(self, *, resamples: int = 10_000, seed: int = 0) -> Quality:
        """The figures for the windows so far.

        Raises:
            ConfigurationError: no window was added.
        """
        if not self._sums:
            raise ConfigurationError("there are no windows to evaluate; give at least one")
        tokens = torch.tensor([count for count, _ in self._sums], dtype=torch.float64)
        sums = torch.stack([each for _, each in self._sums], dim=1)  # (figures, windows)
        means = sums.sum(1) / tokens.sum()
        intervals = bootstrap_intervals(sums, tokens, resamples=resamples, seed=seed)
        fields: dict[str, Any] = {
            "windows": len(self._sums),
            "tokens": int(tokens.sum()),
            "nll": (sums[0] / tokens).tolist(),
            "perplexity": float(means[0].exp()),
            "perplexity_interval": _exp(intervals[0]),
        }
        if self._reference is not None:
            fields |= {
                "reference_nll": ((sums[0] - sums[1]) / tokens).tolist(),
                "reference_perplexity": float((means[0] - means[1]).exp()),
                "perplexity_ratio": float(means[1].exp()),
                "perplexity_ratio_interval": _exp(intervals[1]),
                "kl": float(means[2]),
                "kl_interval": intervals[2],
                "top1_agreement": float(means[3]),
                "top1_agreement_interval": intervals[3],
            }
        return Quality(**fields)


def window_logits(model: Any, window: Tensor) -> Tensor:
    """Logits of one window (T,), without those for the token after its end: (T - 1, V), in the model's dtype."""
    logits: Tensor = model(input_ids=window.to(model.device)[None], use_cache=False).logits[0, :-1]
    return logits


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of (T, V) logits that are small enough to be converted to fp32."""
    step = max(1, CHUNK // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _sums(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """Sums over positions, fp64: -log p; and with a reference log q - log p, KL(q || p), agreement."""
    total = torch.zeros(1 if reference is None else 4, dtype=torch.float64)
    for rows in row_chunks(logits):
        log_p = logits[rows].float().log_softmax(-1)
        target = targets[rows, None]
        own = -log_p.gather(1, target).sum(dtype=torch.float64)
        figures = [own]
        if reference is not None:
            log_q = reference[rows].float().to(log_p.device).log_softmax(-1)
            q = log_q.exp()
            # Tokens that the reference excludes, with a logit of -inf, contribute 0 and not 0 * inf.
            terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
            figures.append(own + log_q.gather(1, target).sum(dtype=torch.float64))
            figures.append(terms.sum(dtype=torch.float64))
            figures.append((log_p.argmax(-1) == log_q.argmax(-1)).sum(dtype=torch.float64))
        total += torch.stack(figures).cpu()
    return total


def bootstrap_intervals(sums: Tensor, tokens: Tensor, *, resamples: int, seed: int) -> list[Interval | None]:
    """Percentile bootstrap of means per token (Efron 1979): windows are drawn with replacement.

    Args:
        sums: (figures, W) fp64, the sum of each figure over each window's tokens. All are resampled alike.
        tokens: (W,) fp64, tokens per window.
        resamples: how often W windows are drawn.
        seed: of the draws.

    Returns:
        One 95 % interval per figure; ``None`` if W is 1.

    Raises:
        ConfigurationError: ``resamples`` is less than 1.

    Example:
        >>> sums, tokens = torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([1.0, 1.0, 1.0])
        >>> bootstrap_intervals(sums, tokens, resamples=100, seed=0)
        [(2.0, 2.0)]
    """
    if resamples < 1:
        raise ConfigurationError(f"resamples must be at least 1, got {resamples}")
    count = len(tokens)
    if count == 1:
        return [None] * len(sums)
    generator = torch.Generator().manual_seed(seed)
    means = []
    block = max(1, CHUNK // count)
    for start in range(0, resamples, block):
        drawn = torch.randint(count, (min(block, resamples - start), count), generator=generator)
        means.append(sums[:, drawn].sum(-1) / tokens[drawn].sum(-1))
    bounds = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=sums.dtype)
    quantiles = torch.quantile(torch.cat(means, dim=1), bounds, dim=1)  # (2, figures)
    return [(float(low), float(high)) for low, high in quantiles.T]


def _exp(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    low, high = torch.tensor(interval, dtype=torch.float64).exp().tolist()
    return low, high


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
