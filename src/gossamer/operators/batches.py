"""Batches of data: what a loader may give, how a model is called with it, and its samples.

A batch is a mapping of tensors, a pair of inputs and targets, or inputs alone: a tensor, or a tuple or list of one
tensor as ``TensorDataset`` gives it. Inputs and targets may themselves be mappings or tuples of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gossamer.errors import ConfigurationError


def run_batch(model: Callable[..., Any], batch: Any) -> tuple[Any, Any]:
    """A batch through a model: its outputs, and what the loss function takes beside them: targets, or the batch.

    Raises:
        ConfigurationError: the batch is of another kind than those above.

    >>> import torch
    >>> run_batch(torch.neg, torch.ones(2))
    (tensor([-1., -1.]), tensor([1., 1.]))
    """
    if isinstance(batch, Mapping):
        return model(**batch), batch
    inputs, targets = parts_of(batch)
    return model(inputs), batch if targets is None else targets


def parts_of(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch that is no mapping; ``None`` for targets where it has none."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    found = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise ConfigurationError(
        f"a batch is a mapping of tensors, a pair of inputs and targets, or a tensor of inputs; the loader gave {found}"
    )


def as_tree(batch: Any) -> Any:
    """The same batch of types that ``torch.func`` takes apart."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return batch if isinstance(batch, Tensor) else tuple(batch)


def size_of(batch: Any) -> int:
    """How many samples a batch has: the length of its tensors.

    Raises:
        ConfigurationError: it has no tensor, or tensors of several lengths.
    """
    lengths = {len(leaf) for leaf in tree_leaves(as_tree(batch)) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(lengths) != 1:
        raise ConfigurationError(
            f"the tensors of a batch have one length, the number of samples; got {sorted(lengths)}"
        )
    return lengths.pop()


def samples_of(batch: Any) -> Iterator[Any]:
    """Its samples, as batches of one.

    >>> import torch
    >>> [sample.tolist() for sample in samples_of(torch.tensor([[1, 2], [3, 4]]))]
    [[[1, 2]], [[3, 4]]]
    """

    def one(index: int) -> Callable[[Any], Any]:
        return lambda leaf: leaf[index : index + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    tree = as_tree(batch)
    for index in range(size_of(batch)):
        yield tree_map(one(index), tree)
