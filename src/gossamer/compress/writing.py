"""A model in memory becomes a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from gossamer.models.shards import Progress, ShardWriter, TensorSpec


def write_model(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    on_bytes: Progress,
    stored: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> int:
    """Writes weights, configurations and tokenizer into ``directory``, which is made.

    Args:
        network: the model.
        tokenizer: its.
        directory: to write.
        on_bytes: called with the bytes of weights that are written and the bytes there will be.
        stored: what is written in place of some weights: by the weight's name, tensors by the last part of theirs.

    Returns:
        Bytes of the weights.
    """
    directory.mkdir()
    written = _write_weights(network, directory, on_bytes, stored or {})
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(directory)
    if network.can_generate():
        network.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return written


def dtype_name(network: PreTrainedModel) -> str:
    """The type of the weights that are not int8, as configurations call it."""
    return str(network.dtype).removeprefix("torch.")


def _write_weights(
    network: PreTrainedModel, directory: Path, on_bytes: Progress, stored: Mapping[str, Mapping[str, Tensor]]
) -> int:
    state = _without_ties(network)
    for name, fields in stored.items():
        del state[name]
        state |= {f"{name.rpartition('.')[0]}.{last}": tensor for last, tensor in fields.items()}
    tensors = revert_weight_conversion(network, state)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    total = sum(spec.nbytes for spec in specs)
    done = 0
    with ShardWriter(directory, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
            done += tensor.nbytes
            on_bytes(done, total)
    return total


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
