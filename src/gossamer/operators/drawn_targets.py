"""Targets drawn from a model's own distribution, for the Fisher matrix itself in place of the empirical one.

The matrix is the mean of ``g g^T`` over targets that the model draws, where g is the gradient of their negative
log-likelihood (Kunstner et al. 2019, arXiv 1905.12558). For classes, logits z and ``p = softmax(z)``, that likelihood
has the gradient ``p - e_y`` by z. A loss with another gradient is another distribution's, which would have to be drawn
from in another way: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.batches import parts_of, run_batch

IGNORED = -100  # a label that is no target, in PyTorch's losses and transformers' models
_TOLERANCE = 1e-3  # of what is left of the gradient, squared, relative to all of it


class TargetDrawing:
    """Replaces the targets of batches by drawn ones.

    Args:
        model: gives logits over the last dimension, or outputs with ``logits``.
        loss_fn: as for :func:`~gossamer.operators.fisher_gradients.gradients_of`.
    """

    def __init__(self, model: Callable[..., Any], loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._shift: int | None = None  # position of a target minus that of the logits that predict it

    def draw(self, batch: Any) -> Any:
        """The same inputs with drawn targets; what was no target (-100) stays none.

        Raises:
            ConfigurationError: there are no class numbers to draw, or the loss is not their negative log-likelihood.
        """
        targets = self._targets(batch)
        if self._shift is None:
            self._shift = self._find_shift(batch, targets)
        with torch.no_grad():
            logits = _logits(run_batch(self._model, batch)[0])
        drawn = torch.distributions.Categorical(logits=logits.float()).sample()
        places = targets[..., self._shift :]
        drawn = torch.where(places < 0, places, drawn[..., : drawn.shape[-1] - self._shift].to(targets))
        new = torch.cat([targets[..., : self._shift], drawn], -1) if self._shift else drawn
        return {**batch, "labels": new} if isinstance(batch, Mapping) else (parts_of(batch)[0], new)

    def _targets(self, batch: Any) -> Tensor:
        targets = batch.get("labels") if isinstance(batch, Mapping) else parts_of(batch)[1]
        if targets is None:
            raise ConfigurationError("fisher='mc' replaces the targets ('labels') of a batch, and this one has none")
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
            kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise ConfigurationError(
                f"fisher='mc' draws class numbers, and the targets here are {kind}: it knows no distribution of them. "
                "Use fisher='empirical'."
            )
        return targets

    def _find_shift(self, batch: Any, targets: Tensor) -> int:
        """Whether a target stands at the place of its logits, or one later, as the next token of a text does."""
        with torch.enable_grad():
            outputs, others = run_batch(self._model, batch)
            logits = _logits(outputs)
            if logits.shape[:-1] != targets.shape or logits.shape[-1] < 2:
                raise ConfigurationError(
                    f"fisher='mc' draws one of several classes for each target, and outputs of {list(logits.shape)} "
                    f"are no logits of targets of {list(targets.shape)}. Use fisher='empirical'."
                )
            loss = self._loss_fn(outputs, others)
            [gradient] = torch.autograd.grad(loss, [logits], allow_unused=True)
        for shift in (0, 1) if targets.dim() > 1 else (0,):
            if gradient is not None and _is_score(gradient.float(), logits.detach().float(), targets, shift):
                return shift
        raise ConfigurationError(
            "fisher='mc' draws targets from softmax(outputs), and this loss is not their negative log-likelihood "
            "(cross-entropy, without label smoothing): its targets cannot be drawn. Use fisher='empirical'."
        )


def _logits(outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or not logits.dim():
        raise ConfigurationError("fisher='mc' draws from logits: a tensor, or outputs that have `logits`")
    return logits


def _is_score(gradient: Tensor, logits: Tensor, targets: Tensor, shift: int) -> bool:
    """Whether a gradient by logits is a multiple of ``softmax(logits) - e_target`` in every row that has a target."""
    length = targets.shape[-1] - shift
    wanted = targets[..., shift:]
    counted = (wanted >= 0) & (wanted < logits.shape[-1])
    if not bool(counted.any()):
        return False
    rows = logits[..., :length, :] if targets.dim() else logits
    found = gradient[..., :length, :] if targets.dim() else gradient
    probabilities = rows.softmax(-1)
    if bool((rows.logsumexp(-1).abs() < 1e-3).all()):  # log-probabilities: their sum cannot move
        found = found - found.sum(-1, keepdim=True) * probabilities
    score = probabilities - torch.nn.functional.one_hot(wanted.clamp(0, logits.shape[-1] - 1).long(), logits.shape[-1])
    size = score.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    factor = (found * score).sum(-1, keepdim=True) / size * counted[..., None]
    rest = (found - factor * score).square().sum()
    total = gradient.square().sum()
    return bool((factor >= 0).all()) and bool(total > 0) and bool(rest <= _TOLERANCE * total)
