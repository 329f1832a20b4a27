"""What a checkpoint says about generating: where its texts end, and how its authors advise to sample."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import InvalidSamplingParamsError
from gossamer.models.progress import say
from gossamer.sampling_params import SamplingParams

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> frozenset[int]:
    """Every token that ends a text, by the generation configuration, the model's configuration and the tokenizer.

    An id that no row of the output layer has, such as -1, can never be generated: it is left out, and said.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        name: of the model, for the notice.
    """
    config = model.config.get_text_config()
    found: set[Any] = set()
    for source in (getattr(model, "generation_config", None), config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [value] if value is not None else ())
    possible = frozenset(each for each in found if isinstance(each, int) and 0 <= each < config.vocab_size)
    if odd := sorted(found - possible, key=str):
        say(f"{name}: its eos_token_id names {odd}, which none of its {config.vocab_size} tokens has; left out")
    return possible


def advised_sampling(model: PreTrainedModel, name: str) -> dict[str, float]:
    """What ``generation_config.json`` says about sampling, under the names of ``SamplingParams``.

    Args:
        model: the model.
        name: of the model, for the notice about a value that makes no sense; it is left out.
    """
    advised = {}
    for field in _SAMPLING:
        value = getattr(getattr(model, "generation_config", None), field, None)
        if value is None:
            continue
        try:
            SamplingParams(**{field: value})
        except InvalidSamplingParamsError as error:
            say(f"{name}: its generation_config.json is not followed: {error}")
        else:
            advised[field] = value
    return advised
