"""LLM.int8() as a quantization method of transformers' ``from_pretrained``, for loading, saving and loading again.

Weights are quantized as they are read: a tensor is mapped from its file and quantized a few megabytes at a time, so
that a model needs little more memory while it is loaded than afterwards.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.errors import CheckpointError, GossamerError
from gossamer.models.described import settle_ties
from gossamer.models.int8_layout import sparse_layers
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import TensorSpec
from gossamer.nn.experts import SeparateExperts, separate_experts
from gossamer.nn.int8_embedding import Int8Embedding, Int8TiedHead
from gossamer.nn.int8_linear import Decomposition, Int8Linear
from gossamer.nn.int8_weight import Int8Weight, Rows, is_conv1d, linear_weight, quantize_weight
from gossamer.nn.outlier_store import find_outlier_columns, random_reading, store_size
from gossamer.nn.quantize import (
    OUTLIER_STORE,
    SKIP,
    LayerReport,
    QuantizationReport,
    check_store,
    describe,
    find_skipped,
    matches,
    refuse_quantized,
    tied_head,
)
from gossamer.nn.sparse_int8_linear import SparseInt8Linear, mask_bytes, sparse_if_smaller
from gossamer.options import Criterion, Outliers

QUANT_METHOD = "gossamer_int8"
_FIRST_EXPERT = ".experts.0.gate_proj.weight"  # in the names of a checkpoint that has each expert by itself

# Called with the name of each layer that has been quantized; set it with :func:`listening`.
_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)
# Of the checkpoint that is being loaded; set it with :func:`reading`.
_reader: ContextVar[ShardReader | None] = ContextVar("reader", default=None)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have ``listener`` called with the name of every layer that is quantized in the body, for progress bars."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def reading(reader: ShardReader) -> Iterator[None]:
    """Have models that are loaded in the body take what they need besides their weights from ``reader``."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


@register_quantization_config(QUANT_METHOD)
class GossamerInt8Config(QuantizationConfigMixin):
    """How a model's linear layers are quantized to int8. Importing it makes transformers know the method.

    Args:
        threshold, criterion, outliers: what counts as an outlier; see :func:`gossamer.ops.int8.int8_linear`. The
            paper's setting is ``threshold=6.0, criterion="absolute", outliers="batch"``.
        outlier_store: share of each layer's input columns whose weights are kept in 16 bit as well. Where they stand
            is found by letting the quantized model read random tokens once.
        skip: names of modules to leave as they are: a whole path, its first or last parts, or a regular expression.

    Raises:
        ConfigurationError: a setting has no meaning.

    Example::

        from gossamer import GossamerInt8Config
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", quantization_config=GossamerInt8Config())
        print(model.hf_quantizer.report)
        model.save_pretrained("qwen3-int8")
        model = AutoModelForCausalLM.from_pretrained("qwen3-int8")  # it knows by itself how it was quantized
    """

    def __init__(
        self,
        threshold: float = 6.0,
        criterion: Criterion = "relative",
        outliers: Outliers | None = "token",
        outlier_store: float = OUTLIER_STORE,
        skip: Sequence[str] = SKIP,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.threshold = threshold
        self.criterion = criterion
        self.outliers = outliers
        self.outlier_store = outlier_store
        self.skip = list(skip)
        self.decomposition()
        check_store(outlier_store)

    def decomposition(self) -> Decomposition:
        """The part of the settings that a layer needs."""
        return Decomposition(self.threshold, self.criterion, self.outliers)


@register_quantizer(QUANT_METHOD)
class GossamerInt8Quantizer(HfQuantizer):
    """Puts int8 layers into a model before its weights are read, and quantizes the weights while they are.

    Attributes:
        report: what was quantized and what not.
    """

    quantization_config: GossamerInt8Config
    serialized_names = {  # noqa: RUF012  as the base class has it
        "weight": [
            "weight",
            "scale",
            "outlier_columns",
            "outlier_weight",
            "weight_codes",
            "weight_mask",
            "weight_shape",
        ]
    }

    def __init__(self, quantization_config: GossamerInt8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = QuantizationReport()
        self.sources: dict[str, Callable[[], Rows]] = {}  # by layer: opens the weight it was quantized from
        self.conv1d: set[str] = set()  # layers whose weights are transposed in the checkpoint
        self.reader: ShardReader | None = None
        self.faults: list[GossamerError] = []  # raised at the end; transformers swallows it before

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: the gradient reaches the input of every layer."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Outlier weights and scales stay in the type they are stored in, whatever the model's is."""
        exact = str(converter.target_patterns[0]).endswith((".outlier_weight", ".scale"))
        return None if exact else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name == "weight" and isinstance(module, (Int8Linear, Int8Embedding))

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.reader = _reader.get()
        files = [Path(file) for file in checkpoint_files or ()]
        if self.reader is None and files and files[0].suffix == ".safetensors":  # transformers reads them by itself
            self.reader = ShardReader(files)
            settle_ties(model, self.reader)
        refuse_quantized(model)
        if self.reader is not None and any(_FIRST_EXPERT in name for name in self.reader.specs):
            separate_experts(model, self._takes)  # each is read, and quantized, by itself
        self.report.skipped = find_skipped(model, self.quantization_config.skip)
        head = tied_head(model)
        stored = self._sparse_shapes() if self.pre_quantized else {}
        for name, layer in list(model.named_modules()):
            weight = linear_weight(layer)
            if weight is None or self._stays(name, model.base_model_prefix):
                continue
            if layer is head:
                self._share_store(model, name)
                continue
            outputs, inputs = weight.shape
            # a model that is quantized while it loads gets its outlier stores afterwards
            columns = store_size(inputs, self.quantization_config.outlier_store) if self.pre_quantized else 0
            settings: dict[str, Any] = {
                "decomposition": self.quantization_config.decomposition(),
                "num_outlier_columns": columns,
                "device": "meta",
                "dtype": weight.dtype,
            }
            biased = layer.bias is not None
            if sparse := _stored(stored, name, model.base_model_prefix):
                nonzeros = _check_sparse(name, sparse, outputs, inputs)
                model.set_submodule(name, SparseInt8Linear(inputs, outputs, biased, nonzeros=nonzeros, **settings))
                continue
            if is_conv1d(layer):
                self.conv1d.add(name)
            model.set_submodule(name, Int8Linear(inputs, outputs, biased, **settings))

    def _takes(self, experts: str) -> bool:
        """Whether the experts of this name are quantized."""
        return not matches(experts, self.quantization_config.skip)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Experts that are separate are not joined."""
        if any(isinstance(module, SeparateExperts) for module in model.modules()):
            weight_conversions = [each for each in weight_conversions if not _joins_experts(each)]
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return updated

    def _stays(self, name: str, prefix: str) -> bool:
        """Whether a layer is left in floating point: as the checkpoint has it, or as the settings say."""
        if self.pre_quantized and self.reader:
            for each in _names(name, prefix):
                if stored := self.reader.specs.get(f"{each}.weight") or self.reader.specs.get(f"{each}.weight_codes"):
                    return stored.dtype != torch.int8
        return name in self.report.skipped

    def _sparse_shapes(self) -> dict[str, tuple[TensorSpec, TensorSpec]]:
        """Codes and mask of every layer that the checkpoint stores without its zeros, from the files' headers."""
        specs = self.reader.specs if self.reader else {}
        return {
            _of_any_mixture(path): (specs[f"{path}.weight_codes"], specs[f"{path}.weight_mask"])
            for path in sparse_layers(specs)
        }

    def _share_store(self, model: PreTrainedModel, head: str) -> None:
        embedding = Int8Embedding.like(model.get_input_embeddings(), device="meta")
        model.set_input_embeddings(embedding)
        bias = model.get_submodule(head).bias
        model.set_submodule(head, Int8TiedHead(embedding, self.quantization_config.decomposition(), bias))
        model.all_tied_weights_keys.pop(f"{head}.weight", None)  # tied by what the modules are

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWhileLoading(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.faults:
            raise self.faults[0]
        if self.pre_quantized:
            for name, layer in model.named_modules():
                if isinstance(layer, SparseInt8Linear):
                    layer.check(name)
        else:
            self._quantize_experts(model)
            self._fill_outlier_stores(model)
            self._drop_zeros(model)
        self.sources.clear()
        self.reader = None
        return model

    def _quantize_experts(self, model: PreTrainedModel) -> None:
        """Those that the checkpoint has in one tensor."""
        for experts in separate_experts(model, self._takes):
            for name, layer in list(model.get_submodule(experts).named_modules(prefix=experts)):
                if (weight := linear_weight(layer)) is None:
                    continue
                quantized = quantize_weight(weight.detach(), f"the weight of {name}")
                int8 = Int8Linear.from_weight(quantized, decomposition=self.quantization_config.decomposition())
                model.set_submodule(name, int8)
                self.report.layers.append(describe(name, int8, weight.element_size(), quantized.relative_error))
                self.sources[name] = weight.detach
            for name in [name for name in self.report.skipped if name.startswith(f"{experts}.")]:
                del self.report.skipped[name]

    def _drop_zeros(self, model: PreTrainedModel) -> None:
        """Layers with many zeros are stored without them."""
        for place, report in enumerate(self.report.layers):
            layer = model.get_submodule(report.name)
            if not isinstance(layer, Int8Linear) or (sparse := sparse_if_smaller(layer)) is layer:
                continue
            model.set_submodule(report.name, sparse)
            self.report.layers[place] = describe(report.name, sparse, _element_size(report), report.relative_error)
            del layer
            _return_free_memory()

    def _fill_outlier_stores(self, model: PreTrainedModel) -> None:
        """Find the columns by watching the int8 model, and take their weights from where these were read."""
        config = self.quantization_config
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
        run = random_reading(model)
        if run is None or not config.outlier_store or set(layers) - set(self.sources):
            config.outlier_store = 0.0  # what is saved must say what is there
            return
        columns = find_outlier_columns(layers, config.outlier_store, run)
        _return_free_memory()
        for place, layer_report in enumerate(self.report.layers):
            name = layer_report.name
            if name not in layers:  # the embedding that a tied output layer shares
                continue
            layer = layers[name]
            layer.keep_columns(columns[name], self.sources[name]())
            self.report.layers[place] = describe(name, layer, _element_size(layer_report), layer_report.relative_error)
            _return_free_memory()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Int8Linear):
                model.set_submodule(name, layer.dequantize(dtype or torch.float32))
        return model


def _joins_experts(conversion: Any) -> bool:
    """Whether it makes one tensor of the matrices of all experts of a layer."""
    return any(str(name).endswith(("experts.gate_up_proj", "experts.down_proj")) for name in conversion.target_patterns)


def _element_size(report: LayerReport) -> int:
    return report.bytes_before // (report.in_features * report.out_features)


def _stored(
    stored: dict[str, tuple[TensorSpec, TensorSpec]], name: str, prefix: str
) -> tuple[TensorSpec, TensorSpec] | None:
    names = map(_of_any_mixture, _names(name, prefix))
    return next((stored[each] for each in names if each in stored), None)


def _of_any_mixture(path: str) -> str:
    """Without the name of what holds experts, which differs between checkpoints and transformers (Mixtral).

    >>> _of_any_mixture("model.layers.0.block_sparse_moe.experts.1.up_proj")
    'model.layers.0.experts.1.up_proj'
    """
    return re.sub(r"\.\w+\.experts\.", ".experts.", path)


def _names(name: str, prefix: str) -> tuple[str, ...]:
    """Of a module in a checkpoint, whether model and checkpoint have the output layer or only the body."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _check_sparse(name: str, specs: tuple[TensorSpec, TensorSpec], outputs: int, inputs: int) -> int:
    """The number of codes that are not zero.

    Raises:
        CheckpointError: the mask is not that of a weight (outputs, inputs), or there are more codes than weights.
    """
    codes, mask = specs
    expected = (outputs, mask_bytes(inputs))
    if mask.shape != expected:
        raise CheckpointError(
            f"{mask.name} is {list(mask.shape)}; the model's {name} of {[outputs, inputs]} needs {list(expected)}. "
            "The checkpoint is of another model, or damaged."
        )
    if codes.shape[0] > outputs * inputs:
        raise CheckpointError(
            f"{codes.name} holds {codes.shape[0]} codes; {name} has {outputs * inputs} weights. "
            "The checkpoint is damaged; copy or make it again."
        )
    return codes.shape[0]


class _QuantizeWhileLoading(ConversionOps):
    """The weight of one layer: floating point in, codes and scale out."""

    def __init__(self, quantizer: GossamerInt8Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Sequence[str] = (), model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for target, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = target.removesuffix(".weight")
            transposed = name in self.quantizer.conv1d
            quantized = self._quantize(weight.t() if transposed else weight, target)
            result |= {target: quantized.codes, f"{name}.scale": quantized.scale}
            layer = model.get_submodule(name)
            report = describe(name, layer, weight[:1].element_size(), quantized.relative_error)
            self.quantizer.report.layers.append(report)
            if isinstance(layer, Int8Linear):
                self._remember(name, weight, source_patterns, transposed)
            _return_free_memory()
            if listener := _listener.get():
                listener(name)
        return result

    def _quantize(self, weight: Rows, target: str) -> Int8Weight:
        try:
            return quantize_weight(weight, target)
        except GossamerError as error:
            self.quantizer.faults.append(error)
            outputs, inputs = weight.shape
            return Int8Weight(torch.zeros(outputs, inputs, dtype=torch.int8), torch.zeros(outputs), 0.0)

    def _remember(self, name: str, weight: Any, keys: Sequence[str], transposed: bool) -> None:
        """How to read the weight again, for the columns of the outlier store; not the weight itself."""
        if not isinstance(weight, Tensor):
            self.quantizer.sources[name] = lambda: weight  # a reader, which holds no memory
        elif self.quantizer.reader and len(keys) == 1 and keys[0] in self.quantizer.reader.specs:
            self.quantizer.sources[name] = partial(_read, self.quantizer.reader, keys[0], transposed)


def _read(reader: ShardReader, key: str, transposed: bool) -> Tensor:
    """The tensor as it lies in the file, mapped, not copied."""
    tensor = reader.tensor(key)
    return tensor.t() if transposed else tensor


def _return_free_memory() -> None:
    """Have the C library return what it holds for later: pieces of weights would leave holes between the codes."""
    if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "malloc_trim"):
        _libc.malloc_trim(0)


def mark_quantized(model: nn.Module, config: GossamerInt8Config, report: QuantizationReport) -> None:
    """Tell a transformers model that was quantized in place what it is, so that ``save_pretrained`` writes that."""
    if not isinstance(model, PreTrainedModel):
        return
    quantizer = GossamerInt8Quantizer(config, pre_quantized=True)
    quantizer.report = report
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.config.quantization_config = config
