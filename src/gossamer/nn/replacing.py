"""Putting a module into the place of another one: what the new one has to keep, and when it cannot."""

from __future__ import annotations

import dis
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

# What modules do when they are made, filled or tied again; a replacement comes after.
_SETTING_UP = ("init", "reset_parameters", "tie_weights", "set_input_embeddings", "set_output_embeddings")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


# A text without ids of tokens is looked up in its weight backwards; here, texts always have them.
_READ_WITHOUT_TOKENS = (("Gemma4TextModel", "embed_tokens"),)


def irreplaceable(layer: nn.Module, name: str, parent: nn.Module) -> str:
    """Why a layer with ``weight`` and ``bias`` cannot give way to one with another ``weight``; empty when it can.

    Args:
        layer: the layer.
        name: its name in ``parent``.
        parent: the module that calls it.

    >>> block = nn.TransformerEncoderLayer(8, 2)
    >>> irreplaceable(block.linear1, "linear1", block)
    'TransformerEncoderLayer reads its weight by itself'
    """
    extra = {*dict(layer.named_parameters()), *dict(layer.named_buffers())} - {"weight", "bias"}
    if extra or "weight" not in layer._parameters:
        return f"its weight is computed from {', '.join(sorted(extra)) or 'something else'}"
    return used_otherwise(layer, name, parent)


def used_otherwise(layer: nn.Module, name: str, parent: nn.Module) -> str:
    """Why calling another module in its place would not be the same; empty when it would."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    if (type(parent).__name__, name) in _READ_WITHOUT_TOKENS:
        return ""
    if name in weights_read_by(type(parent)):  # type: ignore[arg-type]  # mypy looks at the hash of instances
        return f"{type(parent).__name__} reads its weight by itself"
    return ""


@cache
def weights_read_by(kind: type) -> frozenset[str]:
    """Names of the submodules whose ``weight`` a class reads instead of calling them, by its methods' code.

    A fused version of several layers does that, and whoever converts an input to the type of the weight.

    >>> sorted(weights_read_by(nn.MultiheadAttention))
    ['out_proj']
    """
    found: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, method in vars(base).items():
            code = getattr(getattr(method, "__func__", method), "__code__", None)
            if code is not None and not any(part in name for part in _SETTING_UP):
                found |= _read_in(code)
    return frozenset(found)


def _read_in(code: CodeType) -> set[str]:
    """Every X of an expression ``.X.weight`` that is read, not set."""
    loads = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    found = {
        str(first.argval)
        for first, second in pairwise(loads)
        if first.opname == second.opname == "LOAD_ATTR" and second.argval == "weight"
    }
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return found.union(*map(_read_in, inner))


def take_place(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hand what surrounds a module's weights to its replacement: mode, hooks, and attributes that users gave it.

    Handles of the hooks stay valid.

    >>> import torch
    >>> old, calls = nn.Linear(2, 2), []
    >>> handle = old.register_forward_hook(lambda *_: calls.append(1))
    >>> new = take_place(old.eval(), nn.Linear(2, 2))
    >>> _ = new(torch.ones(1, 2)), handle.remove(), new(torch.ones(1, 2))
    >>> new.training, calls
    (False, [1])
    """
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    own: dict[str, Any] = vars(new)
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in own and not hasattr(type(new), name):
            own[name] = value
    return new
