"""Which sets of weights may be pruned: any of them, n of every m, or whole blocks.

A pattern divides each row of a weight into groups of ``size`` consecutive weights, and knows the subsets of a group
that may be pruned together. The curvature says what it costs to prune a subset Q, with the rest free to make up for it
(optimal brain surgeon; Hassibi and Stork 1992, for groups Kurtic et al. 2022, arXiv 2203.07259):

    cost(Q) = 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

Scope = Literal["global", "layer", "row"]
MAX_SUBSETS = 1000
_PIECE = 1 << 22  # numbers that are worked on at a time


class Pattern(Protocol):
    """See the module. ``size`` is that of a group, ``subsets`` (C, q) what of it may be pruned together."""

    @property
    def size(self) -> int: ...

    @property
    def subsets(self) -> Tensor: ...

    def check(self, name: str, columns: int) -> None:
        """Refuses a weight with rows that do not divide into groups."""

    def check_sparsity(self, sparsity: float) -> None:
        """Refuses a share that the pattern cannot give."""

    def keep(self, costs: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """From the cost (N, K / size, C) of each subset of each weight, masks (N, K): True is kept."""


def check_share(sparsity: float) -> None:
    """Refuses a sparsity outside of 0 to 1.

    Raises:
        ConfigurationError

    >>> check_share(1.0)
    Traceback (most recent call last):
    gossamer.errors.ConfigurationError: sparsity is the share of weights that become zero, between 0 and 1, got 1.0
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ConfigurationError(
            f"sparsity is the share of weights that become zero, between 0 and 1, got {sparsity!r}"
        )


@dataclass(frozen=True)
class Block:
    """``size`` consecutive weights of a row are pruned together or not at all.

    Args:
        size: of a block.
        scope: where blocks compete: all of the model's (``"global"``), those of a weight (``"layer"``), or of a row.
    """

    size: int = 4
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.size < 1 or self.scope not in ("global", "layer", "row"):
            raise ConfigurationError(
                f"a block has at least one weight, and competes in 'global', 'layer' or 'row'; got {self}"
            )

    def __str__(self) -> str:
        kind = "unstructured" if self.size == 1 else f"blocks of {self.size}"
        return f"{kind}, each {'model' if self.scope == 'global' else self.scope} for itself"

    @property
    def subsets(self) -> Tensor:
        return torch.arange(self.size)[None]

    def check(self, name: str, columns: int) -> None:
        if columns % self.size:
            raise ConfigurationError(
                f"the rows of {name} have {columns} weights, which blocks of {self.size} do not divide"
            )

    def check_sparsity(self, sparsity: float) -> None:
        check_share(sparsity)

    def keep(self, costs: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        if self.scope == "global":
            every = torch.cat([cost.reshape(-1) for cost in costs.values()])
            kept = _keep_most_costly(every[None], sparsity)[0].split([cost.numel() for cost in costs.values()])
            masks = {name: mask.reshape(costs[name].shape[:2]) for name, mask in zip(costs, kept, strict=True)}
        elif self.scope == "layer":
            masks = {
                name: _keep_most_costly(cost.reshape(1, -1), sparsity).reshape(cost.shape[:2])
                for name, cost in costs.items()
            }
        else:
            masks = {name: _keep_most_costly(cost[..., 0], sparsity) for name, cost in costs.items()}
        return {name: mask.repeat_interleave(self.size, 1) for name, mask in masks.items()}


def Unstructured(scope: Scope = "global") -> Block:
    """Every weight for itself.

    Args:
        scope: where weights compete: all of the model's (``"global"``), those of a weight (``"layer"``), or of a row.
            Costs of different layers compare only where they are those of one loss: curvatures of gradients.

    >>> Unstructured("row").keep({"w": torch.tensor([[[3.0], [1.0]], [[2.0], [4.0]]])}, 0.5)
    {'w': tensor([[ True, False],
            [False,  True]])}
    """
    return Block(1, scope)


@dataclass(frozen=True)
class NM:
    """Of every ``m`` consecutive weights of a row, ``n`` are kept: 2:4 is what GPUs multiply faster.

    Raises:
        ConfigurationError: not 0 < n < m, or too many ways to choose.

    >>> NM(2, 4).subsets.tolist()
    [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m or math.comb(self.m, self.n) > MAX_SUBSETS:
            raise ConfigurationError(
                f"N:M keeps N of every M weights, 0 < N < M, with at most {MAX_SUBSETS} ways to choose; "
                f"got {self.n}:{self.m}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def size(self) -> int:
        return self.m

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def subsets(self) -> Tensor:
        return torch.tensor(list(combinations(range(self.m), self.m - self.n)))

    def check(self, name: str, columns: int) -> None:
        if columns % self.m:
            raise ConfigurationError(
                f"the rows of {name} have {columns} weights, which groups of {self.m} do not divide: {self.n}:{self.m} "
                "cannot be had; exclude it"
            )

    def check_sparsity(self, sparsity: float) -> None:
        check_share(sparsity)
        if abs(sparsity - self.sparsity) > 1e-9:
            raise ConfigurationError(
                f"{self.n}:{self.m} makes a share of {self.sparsity:g} zero, and no other; got sparsity {sparsity:g}"
            )

    def keep(self, costs: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        masks = {}
        for name, cost in costs.items():
            dropped = self.subsets.to(cost.device)[cost.argmin(2)]
            mask = torch.ones(*cost.shape[:2], self.m, dtype=torch.bool, device=cost.device)
            masks[name] = mask.scatter_(2, dropped, False).flatten(1)
        return masks


def parse_pattern(text: str, scope: Scope = "global") -> Pattern:
    """``unstructured``, ``block4`` or ``2:4``, with any numbers.

    Raises:
        ConfigurationError: it is something else.

    >>> parse_pattern("2:4"), parse_pattern("block8", "row")
    (NM(n=2, m=4), Block(size=8, scope='row'))
    """
    left, colon, right = text.partition(":")
    if colon and left.isdecimal() and right.isdecimal():
        return NM(int(left), int(right))
    if text == "unstructured":
        return Unstructured(scope)
    if text.startswith("block") and text[5:].isdecimal():
        return Block(int(text[5:]), scope)
    raise ConfigurationError(f"a pattern is 'unstructured', 'block4' or '2:4', with numbers of your own; got {text!r}")


def subset_costs(weight: Tensor, inverse: Tensor, pattern: Pattern) -> Tensor:
    """The cost of each subset; see the module.

    Args:
        weight: (N, K).
        inverse: (N, K / size, size, size), or (1, K / size, size, size) where all rows are alike: the diagonal blocks
            of F^-1.
        pattern: has C subsets of q weights.

    Returns:
        (N, K / size, C) fp32.

    >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> subset_costs(weight, torch.eye(4)[None, None], NM(2, 4))[0, 0].tolist()  # (1 + 4) / 2, (1 + 9) / 2, ...
    [2.5, 5.0, 8.5, 6.5, 10.0, 12.5]
    """
    groups = weight.reshape(len(weight), -1, pattern.size)
    subsets = pattern.subsets.to(weight.device)
    count, q = subsets.shape
    if q == 1:
        diagonal = inverse.diagonal(dim1=2, dim2=3)
        return (groups.square() / (2 * diagonal))[:, :, subsets[:, 0]].float()
    costs = torch.empty(*groups.shape[:2], count, device=weight.device)
    shared = None
    if len(inverse) == 1:
        shared = torch.linalg.inv(inverse[0][:, subsets[:, :, None], subsets[:, None, :]].double())
    step = max(1, _PIECE // (groups.shape[1] * count * q * q))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        chosen = groups[rows][:, :, subsets].double()
        if shared is None:
            blocks = inverse[rows][:, :, subsets[:, :, None], subsets[:, None, :]].double()
            made_up = torch.linalg.solve(blocks, chosen[..., None])[..., 0]
        else:
            made_up = (shared @ chosen[..., None])[..., 0]
        costs[rows] = (chosen * made_up).sum(-1).float() / 2
    return costs


def alike_costs(weight: Tensor, pattern: Pattern) -> Tensor:
    """:func:`subset_costs` for F = I: half the squares of a subset, summed up."""
    member = torch.zeros(len(pattern.subsets), pattern.size, device=weight.device)
    member.scatter_(1, pattern.subsets.to(weight.device), 0.5)
    return weight.reshape(len(weight), -1, pattern.size).square() @ member.T


def _keep_most_costly(costs: Tensor, sparsity: float) -> Tensor:
    """(B, n) -> True for all but the round(n sparsity) cheapest of each of the B competitions."""
    drop = round(costs.shape[1] * sparsity)
    keep = torch.ones_like(costs, dtype=torch.bool)
    if drop:
        limit = costs.kthvalue(drop, dim=1, keepdim=True).values
        keep = costs > limit
        spare = costs.shape[1] - drop - keep.sum(1, keepdim=True)  # ties at the limit that are kept: the last ones
        ties = costs == limit
        if bool((spare < ties.sum(1, keepdim=True)).any()):
            ties &= ties.flip(1).cumsum(1).flip(1) <= spare
        keep |= ties
    return keep
