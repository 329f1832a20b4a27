"""Which layers of a model become int8, and the report of what was done and what was not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.nn.experts import is_router
from gossamer.nn.int8_embedding import Int8Embedding, unsupported_embedding
from gossamer.nn.int8_linear import Int8Linear, is_int8
from gossamer.nn.int8_weight import linear_weight
from gossamer.nn.replacing import irreplaceable, used_otherwise
from gossamer.nn.sparse_int8_linear import SparseInt8Linear

SKIP = ("lm_head",)
OUTLIER_STORE = 0.015  # share of the columns; with it an int8 layer takes 0.52 of the bytes of a bf16 one


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: path of the module.
        in_features, out_features: K and N.
        bytes_before, bytes_after: of its weight, with scales and outlier store.
        relative_error: of the int8 weight, Frobenius norm of the error over that of the weight.
        outlier_columns: columns whose weights are kept in 16 bit as well.
        saved_bytes: what leaving its zeros out saves; 0 for a layer that keeps them.
    """

    name: str
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int
    relative_error: float
    outlier_columns: int = 0
    saved_bytes: int = 0


@dataclass
class QuantizationReport:
    """What quantizing a model did: the layers, and by name what was skipped and why."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantized layers' weights before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized layers' weights now, with scales and outlier stores."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers in int8: {self.bytes_before / 1e6:,.1f} MB became "
            f"{self.bytes_after / 1e6:,.1f} MB"
        ]
        sparse = [layer for layer in self.layers if layer.saved_bytes]
        if sparse:
            after = sum(layer.bytes_after for layer in sparse)
            lines.append(
                f"{len(sparse)} of them stored without their zeros: {after / 1e6:,.1f} MB in place of "
                f"{(after + sum(layer.saved_bytes for layer in sparse)) / 1e6:,.1f} MB"
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"not quantized: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def describe(name: str, module: Int8Linear | Int8Embedding, element_size: int, relative_error: float) -> LayerReport:
    """The line of the report for a module whose weight had entries of ``element_size`` bytes."""
    columns = getattr(module, "outlier_columns", None)
    if isinstance(module, Int8Embedding):
        outputs, inputs = module.num_embeddings, module.embedding_dim
    else:
        outputs, inputs = module.out_features, module.in_features
    bytes_after = sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    saved = 0
    if isinstance(module, SparseInt8Linear):
        saved = outputs * inputs - module.weight_codes.nbytes - module.weight_mask.nbytes - module.weight_shape.nbytes
    return LayerReport(
        name,
        inputs,
        outputs,
        outputs * inputs * element_size,
        bytes_after,
        relative_error,
        0 if columns is None else len(columns),
        saved,
    )


def find_skipped(model: nn.Module, skip: Sequence[str]) -> dict[str, str]:
    """Modules and parameters that one might expect to be quantized and that are not, with the reason."""
    skipped = {}
    modules = dict(model.named_modules())
    head = tied_head(model)
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            skipped[name] = "it multiplies by its packed in_proj_weight itself; it is no linear layer"
        elif isinstance(module, nn.Linear) and linear_weight(module) is None:
            skipped[name] = f"a {type(module).__name__} does more than nn.Linear"
        elif linear_weight(module) is not None:
            parent, _, last = name.rpartition(".")
            if matches(name, skip):
                skipped[name] = "named in skip"
            elif name and (reason := irreplaceable(module, last, modules[parent])):
                skipped[name] = reason
            elif is_router(modules[parent]):
                skipped[name] = "it chooses experts"
            elif module is head and (reason := _fixed_embedding(model, modules)):
                skipped[name] = f"tied to an embedding that cannot be quantized: {reason}"
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not matches(name, skip):
            skipped[name] = "a packed parameter of three dimensions, not a linear layer"
    return skipped


def _fixed_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Why the embedding of a transformers model cannot be quantized; empty when it can."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in modules.items() if module is embedding), "")
    parent, _, last = name.rpartition(".")
    return unsupported_embedding(embedding) or used_otherwise(embedding, last, modules[parent])


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the whole, the first or the last parts of a module's path, as text or regular expression.

    >>> matches("model.layers.1.mlp.gate", ["gate"]), matches("model.layers.1.mlp.gate_proj", ["gate"])
    (True, False)
    """
    return any(re.search(rf"(?:^|\.)(?:{p})$|^(?:{p})(?=\.|$)", name) for p in patterns)


def tied_head(model: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model, if its weight is that of the embedding, or will be once it is read."""
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
        return None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or embedding is None:
        return None
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_meta:  # the weights decide, not what the configuration declares
        return head if weight is getattr(embedding, "weight", 0) else None
    to_be_tied: Any = getattr(model, "all_tied_weights_keys", {})
    declared = any(module is head and f"{name}.weight" in to_be_tied for name, module in model.named_modules())
    return head if declared else None


def check_store(share: float) -> None:
    """Refuses a share of columns outside of 0 to 1.

    Raises:
        ConfigurationError
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigurationError(f"outlier_store is a share of the columns, from 0 to 1, got {share!r}")


def refuse_quantized(model: nn.Module) -> None:
    """Refuses to quantize twice.

    Raises:
        ConfigurationError: names the layer that is int8 already.
    """
    for name, module in model.named_modules():
        if is_int8(module):
            raise ConfigurationError(
                f"the model is quantized already: the weight of {name or 'it'} is int8. "
                "Load it with its original weights."
            )
