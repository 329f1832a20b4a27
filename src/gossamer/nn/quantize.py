"""Quantize a model in memory, layer by layer, and say what was done and what was not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_embedding import Int8Embedding, Int8TiedHead, unsupported_embedding
from gossamer.nn.int8_linear import Decomposition, Int8Linear, is_int8
from gossamer.nn.int8_weight import linear_weight, quantize_weight
from gossamer.nn.outlier_store import find_outlier_columns, random_reading
from gossamer.nn.sparse_int8_linear import SparseInt8Linear, sparse_if_smaller
from gossamer.options import Criterion, Outliers

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
    """What :func:`quantize` did: the layers, and by name what was skipped and why."""

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


def quantize(
    model: nn.Module,
    threshold: float = 6.0,
    skip: Sequence[str] = SKIP,
    outliers: Outliers | None = "token",
    *,
    criterion: Criterion = "relative",
    outlier_store: float = OUTLIER_STORE,
    run: Callable[[], object] | None = None,
) -> QuantizationReport:
    """Replace the linear layers of a model by :class:`Int8Linear`, in place.

    A layer of which enough weights are zero, because it was pruned, becomes a
    :class:`~gossamer.nn.sparse_int8_linear.SparseInt8Linear`: the same codes in less memory.

    Attention, norms and activations stay as they are. If the output layer is tied to the embedding and not skipped,
    both become int8 and share one store.

    Args:
        model: of any kind; weights fp32, bf16 or fp16.
        threshold, criterion, outliers: see :func:`gossamer.ops.int8.int8_linear`. The paper's own setting is
            ``quantize(model, 6.0, outliers="batch", criterion="absolute")``.
        skip: names of modules to leave: a whole path, its first or its last parts, or a regular expression.
        outlier_store: share of each layer's input columns whose weights are kept in 16 bit as well.
        run: calls the model once, to find these columns. A transformers model reads random tokens by default; for
            other models there is no store without it.

    Returns:
        What was done, what was skipped, and why. ``print(report)`` shows it.

    Raises:
        ConfigurationError: a setting has no meaning, the model is quantized already, it has no linear layer, or a
            weight is of another type, NaN or infinite. The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> print(quantize(model, skip=["2"]))
    1 layers in int8: 0.0 MB became 0.0 MB
    not quantized: 2: named in skip
    """
    decomposition = Decomposition(threshold, criterion, outliers)
    check_store(outlier_store)
    refuse_quantized(model)
    report = QuantizationReport(skipped=find_skipped(model, skip))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if linear_weight(layer) is not None and name not in report.skipped
    }
    if "" in layers:
        raise ConfigurationError("the model is a linear layer itself; Int8Linear.from_linear makes one of it")
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} has no linear layer to quantize{_reasons(report)}")
    run = run or random_reading(model)
    columns = find_outlier_columns(layers, outlier_store, run) if run and outlier_store else {}
    replacements = _int8_modules(model, layers, columns, decomposition, report)
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module may have several names
        if module in replacements:
            model.set_submodule(name, replacements[module])
    if hasattr(model, "config"):
        # imported here: plain PyTorch models do without transformers
        from gossamer.models.int8_quantizer import GossamerInt8Config, mark_quantized

        store = outlier_store if columns else 0.0
        mark_quantized(model, GossamerInt8Config(threshold, criterion, outliers, store, skip), report)
    return report


def _int8_modules(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    columns: Mapping[str, Tensor],
    decomposition: Decomposition,
    report: QuantizationReport,
) -> dict[nn.Module, nn.Module]:
    """What takes the place of which module; adds to the report, and leaves the model as it is."""
    head = tied_head(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        weight = linear_weight(layer)
        assert weight is not None
        weight = weight.detach()
        quantized = quantize_weight(weight, f"the weight of {name}")
        if layer is head:
            old: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
            embedding = Int8Embedding.from_embedding(old, quantized)
            replacements |= {old: embedding, layer: Int8TiedHead(embedding, decomposition)}
            report.layers.append(describe(name, embedding, weight.element_size(), quantized.relative_error))
            continue
        bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        int8 = Int8Linear.from_weight(
            quantized, bias, decomposition=decomposition, outlier_columns=columns.get(name), source=weight
        )
        int8 = sparse_if_smaller(int8)
        replacements[layer] = int8.train(layer.training)
        report.layers.append(describe(name, int8, weight.element_size(), quantized.relative_error))
    return replacements


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
    head, embedding = tied_head(model), None
    if head is not None:
        embedding = unsupported_embedding(model.get_input_embeddings())  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and linear_weight(module) is None:
            skipped[name] = f"a {type(module).__name__} does more than nn.Linear"
        elif linear_weight(module) is not None:
            if matches(name, skip):
                skipped[name] = "named in skip"
            elif module is head and embedding:
                skipped[name] = f"tied to an embedding that cannot be quantized: {embedding}"
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not matches(name, skip):
            skipped[name] = "a packed parameter of three dimensions, not a linear layer"
    return skipped


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
    to_be_tied: Any = getattr(model, "all_tied_weights_keys", {})
    declared = any(module is head and f"{name}.weight" in to_be_tied for name, module in model.named_modules())
    return head if declared or getattr(head, "weight", None) is getattr(embedding, "weight", 0) else None


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


def _reasons(report: QuantizationReport) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(report.skipped.items())[:3])
