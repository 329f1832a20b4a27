"""Whether token ids fit the model that a report is to run on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gossamer.errors import ConfigurationError


def check_tokens(ids: Tensor, model: Any, where: str, *, dimensions: tuple[int, ...] = (1,), shortest: int = 1) -> None:
    """Refuses token ids that a model cannot be run on.

    Args:
        ids: what should be token ids.
        model: a transformers causal language model.
        where: how messages name the ids, such as ``"window 3"``.
        dimensions: the numbers of dimensions they may have; the last one is the sequence.
        shortest: fewest tokens of a sequence.

    Raises:
        ConfigurationError: they are too few, longer than the model's context, of another type or shape, or outside the
            vocabulary.
    """
    if ids.dim() not in dimensions or ids.is_floating_point() or ids.is_complex():
        raise ConfigurationError(f"{where} must be integer token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    length = ids.shape[-1]
    if length < shortest or not ids.numel():
        raise ConfigurationError(f"{where} has {length} tokens; at least {shortest} are needed")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ConfigurationError(f"{where} has {length} tokens, and the model's context is {context}: use shorter ones")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ConfigurationError(
            f"{where} holds token id {lowest if lowest < 0 else highest}, and the model's vocabulary has {vocabulary}: "
            "use the model's own tokenizer"
        )
