"""Quantize a model in memory, layer by layer; one of transformers is then saved and loaded as an int8 one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.experts import separate_experts
from gossamer.nn.int8_embedding import Int8Embedding, Int8TiedHead
from gossamer.nn.int8_linear import Decomposition, Int8Linear
from gossamer.nn.int8_weight import linear_weight, quantize_weight
from gossamer.nn.outlier_store import find_outlier_columns, random_reading
from gossamer.nn.quantize import (
    OUTLIER_STORE,
    SKIP,
    QuantizationReport,
    check_store,
    describe,
    find_skipped,
    matches,
    refuse_quantized,
    tied_head,
)
from gossamer.nn.replacing import take_place
from gossamer.nn.sparse_int8_linear import sparse_if_smaller
from gossamer.ops.int8 import Criterion, Outliers


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

    So do the layers of each expert of a mixture, which transformers has in one tensor
    (:class:`~gossamer.nn.experts.SeparateExperts`).

    A layer of which enough weights are zero, because it was pruned, becomes a
    :class:`~gossamer.nn.sparse_int8_linear.SparseInt8Linear`: the same codes in less memory.

    Attention, norms and activations stay as they are, and so does a layer whose weight others read by themselves, such
    as those of ``nn.TransformerEncoderLayer``: the report names it. Biases, hooks and the training mode are kept. If
    the output layer is tied to the embedding and not skipped, both become int8 and share one store.

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
    packed = separate_experts(model, lambda name: not matches(name, skip))
    try:
        report, columns = _quantize(model, decomposition, outlier_store, skip, run)
    except BaseException:
        for name, experts in packed.items():
            model.set_submodule(name, experts)
        raise
    if hasattr(model, "config"):
        # imported here: plain PyTorch models do without transformers
        from gossamer.models.int8_quantizer import GossamerInt8Config, mark_quantized

        store = outlier_store if columns else 0.0
        mark_quantized(model, GossamerInt8Config(threshold, criterion, outliers, store, skip), report)
    return report


def _quantize(
    model: nn.Module,
    decomposition: Decomposition,
    outlier_store: float,
    skip: Sequence[str],
    run: Callable[[], object] | None,
) -> tuple[QuantizationReport, dict[str, Tensor]]:
    """Returns the columns that the layers keep, too; the model is as it was if this raises."""
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
            model.set_submodule(name, take_place(module, replacements[module]))
    return report, columns


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
        bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]  # a linear layer has it
        quantized = quantize_weight(weight, f"the weight of {name}")
        if layer is head:
            old: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]  # of transformers models
            embedding = Int8Embedding.from_embedding(old, quantized)
            replacements |= {old: embedding, layer: Int8TiedHead(embedding, decomposition, bias)}
            report.layers.append(describe(name, embedding, weight.element_size(), quantized.relative_error))
            continue
        int8 = Int8Linear.from_weight(
            quantized, bias, decomposition=decomposition, outlier_columns=columns.get(name), source=weight
        )
        int8 = sparse_if_smaller(int8)
        replacements[layer] = int8
        report.layers.append(describe(name, int8, weight.element_size(), quantized.relative_error))
    return replacements


def _reasons(report: QuantizationReport) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(report.skipped.items())[:3])
