"""Gradients of a model at data, one by one: what Fisher matrices are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gossamer.errors import ConfigurationError
from gossamer.operators.batches import as_tree, run_batch, samples_of
from gossamer.operators.drawn_targets import TargetDrawing
from gossamer.operators.ranks import Ranks, own_columns, together

Parameters = str | Iterable[str]


def select_parameters(model: nn.Module, params: Parameters) -> dict[str, nn.Parameter]:
    """Trainable parameters by name: those whose whole name matches a regular expression, or the names themselves.

    Raises:
        ConfigurationError: there is none, or no such name.

    >>> list(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), r".*weight"))
    ['0.weight', '1.weight']
    """
    every = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(params, str):
        pattern = re.compile(params)
        chosen = {name: parameter for name, parameter in every.items() if pattern.fullmatch(name)}
    else:
        names = list(params)
        if missing := [name for name in names if name not in every]:
            raise ConfigurationError(f"the model has no trainable parameter {missing[0]!r}")
        chosen = {name: every[name] for name in names}
    if not chosen:
        raise ConfigurationError(
            f"no trainable parameter matches {params!r}; the model has {', '.join(every) or 'none'}"
        )
    if complex_ := [name for name, parameter in chosen.items() if parameter.is_complex()]:
        raise ConfigurationError(f"{complex_[0]} is complex; Fisher matrices are of real parameters. Leave it out.")
    return chosen


def gradients_of(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    m: int,
    *,
    per_sample: bool = True,
    fisher: Literal["empirical", "mc"] = "empirical",
    params: Parameters = ".*",
    vectorize: bool = False,
) -> Iterator[Tensor]:
    """Yield ``m`` gradients, (d) fp32 each, of the chosen parameters one after the other, in the order of the model.

    The model is in evaluation mode meanwhile, and keeps the gradients that it has.

    Args:
        model: any module.
        loss_fn: the loss of a batch, ``loss_fn(model(inputs), targets)``; a mean over samples, as PyTorch's are. Where
            batches are mappings, ``loss_fn(model(**batch), batch)``.
        loader: batches: pairs of inputs and targets, mappings of tensors, or tensors of inputs alone, whose
            ``loss_fn(model(inputs), inputs)`` counts. It is gone through again until there are m gradients.
        per_sample: of single samples, whose mean square is the empirical Fisher matrix; otherwise of whole batches,
            whose mean square is smaller by about the size of a batch.
        fisher: ``"empirical"`` takes the targets of the data, ``"mc"`` draws them from the model's own distribution
            (outputs, or their ``logits``, are logits over the last dimension): the Fisher matrix itself on average. The
            loss has to be a cross-entropy of class numbers.
        params: a regular expression that whole names match, or names.
        vectorize: compute the gradients of a batch's samples together (``torch.func``), which is faster for small
            models and takes the memory of as many gradients; for what ``torch.func.vmap`` can transform.

    Raises:
        ConfigurationError: no parameter is chosen, the loader is empty, a batch is of another kind, targets cannot be
            drawn, or a gradient is not finite (its parameter is named).
    """
    chosen = select_parameters(model, params)
    if m < 1:
        raise ConfigurationError(f"at least one gradient is needed, got m={m}")
    if fisher not in ("empirical", "mc"):
        raise ConfigurationError(f"fisher is 'empirical' or 'mc', got {fisher!r}")
    drawing = TargetDrawing(model, loss_fn) if fisher == "mc" else None
    made = 0
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        while made < m:
            before = made
            for batch in loader:
                if drawing is not None:
                    batch = drawing.draw(batch)
                if per_sample and vectorize:
                    gradients: Iterable[Tensor] = _gradients_together(model, loss_fn, batch, chosen)
                else:
                    parts = samples_of(batch) if per_sample else [batch]
                    gradients = (_gradient(model, loss_fn, part, chosen) for part in parts)
                for gradient in gradients:
                    yield gradient
                    made += 1
                    if made == m:
                        return
            if made == before:
                raise ConfigurationError(f"the loader gave no batch after {made} of {m} gradients")
    finally:
        for module, mode in training.items():
            module.training = mode


def shared_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    m: int,
    ranks: Ranks,
    *,
    per_sample: bool = True,
    **settings: Any,
) -> Iterator[Tensor | None]:
    """The same gradients by several processes, in rounds: gradient W k + r of all is process r's in round k.

    Args:
        model, loss_fn, loader, m, per_sample, settings: as for :func:`gradients_of`, the same in each process; what m
            gradients need of the loader is kept. Samples are computed one by one.
        ranks: the processes.

    Yields:
        This process's gradient; ``None`` in the last round, if there are none left for it.

    Raises:
        GossamerError: in all processes, what one of them met.
    """
    with together(ranks, "reading data"):
        pieces = chain.from_iterable(samples_of(batch) for batch in loader) if per_sample else iter(loader)
        known = list(islice(pieces, m))
        if not known:
            raise ConfigurationError("the loader gave no batch")
        own = [known[number % len(known)] for number in range(ranks.rank, m, ranks.size)]
    gradients = gradients_of(model, loss_fn, own, max(len(own), 1), per_sample=False, **settings)
    for first in range(0, m, ranks.size):
        with together(ranks, "computing a gradient"):
            gradient = next(gradients) if first + ranks.rank < m else None
        yield gradient


def cut_gradients(gradients: Iterable[Tensor | None], m: int, ranks: Ranks) -> Iterator[Tensor]:
    """Of m gradients that :func:`shared_gradients` gives, in order, the columns that this process keeps."""
    sizes: list[int] = []
    for number, gradient in enumerate(gradients):
        senders = min(ranks.size, m - number * ranks.size)
        if not sizes:
            d = (
                int(ranks.add(torch.tensor([0.0 if gradient is None else len(gradient)], dtype=torch.float64)))
                // senders
            )
            cuts = [own_columns(d, rank, ranks.size) for rank in range(ranks.size)]
            sizes = [cut.stop - cut.start for cut in cuts]
        sending = torch.empty(0) if gradient is None else gradient
        sent = [0] * ranks.size if gradient is None else sizes
        received = [sizes[ranks.rank] * (rank < senders) for rank in range(ranks.size)]
        yield from ranks.exchange(sending, sent, received).split([sizes[ranks.rank]] * senders)


def _gradient(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any, chosen: Mapping[str, nn.Parameter]
) -> Tensor:
    with torch.enable_grad():
        loss = loss_fn(*run_batch(model, batch))
        parts = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    for name, part in zip(chosen, parts, strict=True):
        if part is not None and not bool(part.isfinite().all()):
            raise ConfigurationError(f"the gradient of {name} has NaN or infinite entries")
    zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(parts, chosen.values(), strict=True))
    return torch.cat([part.reshape(-1).float() for part in zeros])


def _gradients_together(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any, chosen: Mapping[str, nn.Parameter]
) -> Tensor:
    """(samples, d)."""

    def loss(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        def run(*inputs: Any, **named: Any) -> Any:
            return torch.func.functional_call(model, parameters, inputs, named)

        return loss_fn(*run_batch(run, tree_map(lambda part: part[None], sample)))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    found = each({name: parameter.detach() for name, parameter in chosen.items()}, as_tree(batch))
    for name, part in found.items():
        if not bool(part.detach().isfinite().all()):
            raise ConfigurationError(f"the gradient of {name} has NaN or infinite entries")
    return torch.cat([part.detach().reshape(len(part), -1).float() for part in found.values()], 1)
