"""What a checkpoint says about generating: where its texts end, and how its authors advise to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import ConfigurationError, InvalidSamplingParamsError
from gossamer.models.checkpoint_weights import GENERATION_CONFIG
from gossamer.models.json_file import read_object
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


def check_generation_config(source: str) -> None:
    """Whether a ``generation_config`` names something that is there.

    Raises:
        ConfigurationError: a directory has no ``generation_config.json``.
    """
    if source not in ("auto", "none") and not (Path(source) / GENERATION_CONFIG).is_file():
        raise ConfigurationError(
            f"generation_config must be 'auto', 'none' or a directory with a {GENERATION_CONFIG}; {source} has none"
        )


def sampling_defaults(model: PreTrainedModel, name: str, source: str = "auto") -> dict[str, float]:
    """What is said about sampling where a request says nothing.

    Args:
        model: the model.
        name: of the model, for notices.
        source: ``"auto"``: the model's own settings; ``"none"``: nothing; or a directory with others.

    Raises:
        CheckpointError: the file of the directory is damaged.
    """
    if source == "none":
        return {}
    if source != "auto":
        fields = read_object(Path(source) / GENERATION_CONFIG)
        return _sensible({name: fields.get(name) for name in _SAMPLING}, source)
    return advised_sampling(model, name)


def advised_sampling(model: PreTrainedModel, name: str) -> dict[str, float]:
    """What ``generation_config.json`` says about sampling, under the names of ``SamplingParams``.

    Args:
        model: the model.
        name: of the model, for the notice about a value that makes no sense; it is left out.
    """
    config = getattr(model, "generation_config", None)
    return _sensible({field: getattr(config, field, None) for field in _SAMPLING}, name)


def _sensible(settings: dict[str, Any], name: str) -> dict[str, float]:
    advised = {}
    for field, value in settings.items():
        if value is None:
            continue
        try:
            SamplingParams(**{field: value})
        except InvalidSamplingParamsError as error:
            say(f"{name}: its generation_config.json is not followed: {error}")
        else:
            advised[field] = value
    return advised
