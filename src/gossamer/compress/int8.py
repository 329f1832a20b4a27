"""A checkpoint becomes one with int8 weights: quantized as it is read, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.errors import ConfigurationError
from gossamer.models.int8_quantizer import GossamerInt8Config, listening
from gossamer.models.load import load_config, load_model
from gossamer.models.manifest import write_manifest
from gossamer.models.resolve import resolve_model
from gossamer.models.shards import Progress, ShardWriter, TensorSpec
from gossamer.nn.quantize import QuantizationReport


@dataclass(frozen=True)
class CompressReport:
    """What a compression made.

    Attributes:
        path: the directory.
        bytes: its size; ``source_bytes`` that of what it was made from.
        rest: dtype of what is not int8, and its bytes.
        quantization: layer by layer, with what was skipped and why.
    """

    path: Path
    bytes: int
    source_bytes: int
    rest: tuple[str, int]
    quantization: QuantizationReport

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "rest": {"dtype": self.rest[0], "bytes": self.rest[1]},
            "quantization": self.quantization.to_dict(),
        }


def compress_int8(
    model: str | Path,
    output: str | Path,
    config: GossamerInt8Config,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    on_layer: Callable[[str], None] = lambda name: None,
    on_bytes: Progress = lambda done, total: None,
) -> CompressReport:
    """Quantize a model's linear layers (LLM.int8()) and write the result as a Hugging Face directory.

    The weights are mapped from their files and quantized a few megabytes at a time, so that memory holds little more
    than the int8 model. The output is built beside its final place and renamed when it is complete.

    Args:
        model: whatever :func:`gossamer.models.resolve_model` understands.
        output: the directory to write.
        config: how to quantize.
        dtype: of what does not become int8 (embeddings, norms, skipped layers): ``auto`` keeps the checkpoint's.
        overwrite: replace a checkpoint that is there.
        on_layer: called with the name of each layer that was quantized.
        on_bytes: called with the bytes that are written and the bytes there will be.

    Raises:
        ConfigurationError: ``output`` cannot be used, a setting has no meaning, or the model is quantized already.
        GossamerError: what :func:`gossamer.models.load.load_model` raises, or ``output`` cannot be written.
    """
    target = Path(output).resolve()
    source = resolve_model(model, for_int8=True)
    check_output(source.resolve(), target, is_file=False, overwrite=overwrite)
    if source.is_dir() and (stored := getattr(load_config(source), "quantization_config", None)):
        raise ConfigurationError(
            f"{source} is quantized already ({stored.get('quant_method')}); compress the original checkpoint"
        )
    with listening(on_layer):
        network, tokenizer = load_model(source, dtype=dtype, quantization=config)
    report: QuantizationReport = network.hf_quantizer.report
    with all_or_nothing(target) as unfinished:
        unfinished.mkdir()
        rest = _write_weights(network, unfinished, on_bytes)
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(unfinished)
        if network.can_generate():
            network.generation_config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        recipe = {"model": str(model), "int8": network.config.quantization_config.to_dict()}
        write_manifest(unfinished, recipe | {"skipped": report.skipped})
    return CompressReport(target, size_of(target), size_of(source), (_dtype_name(network), rest), report)


def _write_weights(network: PreTrainedModel, directory: Path, on_bytes: Progress) -> int:
    """Writes the state of a model; returns how many bytes of it are not int8 layers'."""
    tensors = revert_weight_conversion(network, _without_ties(network))
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    done = 0
    with ShardWriter(directory, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
            done += tensor.nbytes
            on_bytes(done, total)
    return total - network.hf_quantizer.report.bytes_after


def _without_ties(network: PreTrainedModel) -> dict[str, Tensor]:
    """The state without the second names of tensors; loading ties them again."""
    seen: set[int] = set()
    result = {}
    tied = network.all_tied_weights_keys
    for name, tensor in sorted(network.state_dict().items(), key=lambda item: item[0] in tied):
        if tensor.data_ptr() not in seen or name not in tied:
            result[name] = tensor
        seen.add(tensor.data_ptr())
    return result


def _dtype_name(network: PreTrainedModel) -> str:
    return str(network.dtype).removeprefix("torch.")
