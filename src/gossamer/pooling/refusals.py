"""What is said when a model is asked for what it was not made for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.options import ModelOptions, Options, option_fields

# The options that such a model follows (`max_num_seqs` bounds how many inputs of a batch file are read ahead). Nothing
# of it is kept between two texts, and it draws nothing.
_FOLLOWED = option_fields(ModelOptions).keys() - {"int8_head"} | {"runner", "max_model_len", "max_num_seqs"}


def without_effect(names: Iterable[str]) -> list[str]:
    """Those of some options that change nothing about a model of embeddings or scores.

    >>> without_effect(["dtype", "kv_dtype", "max_model_len", "sharing"])
    ['kv_dtype', 'sharing']
    """
    return [name for name in names if name not in _FOLLOWED]


def check_options(model: str, task: Literal["embed", "score"], options: Options) -> None:
    """Refuses what was asked for and would not be done.

    Raises:
        ConfigurationError: options without an effect are not at their default; it names them.
    """
    names = without_effect(options.changed())
    if names:
        what = "embeddings" if task == "embed" else "scores"
        raise ConfigurationError(
            f"{', '.join(names)}: without an effect on a model of {what}, such as {model}, which generates no text and "
            "keeps no keys and values; leave out what is named"
        )


def makes_no_embeddings(model: str) -> UnsupportedModelError:
    """A model that generates text is asked for vectors or scores of texts."""
    return UnsupportedModelError(
        f"{model} is made to generate text, and its hidden states are poor embeddings; use a model of embeddings, such "
        "as all-minilm-l6-v2, or ask for it when the model is loaded: --task embed, or LLM(..., task='embed')"
    )


def generates_no_text(model: str, task: str) -> UnsupportedModelError:
    """A model of embeddings or scores is asked for text."""
    uses = {
        "embed": "it makes embeddings: /v1/embeddings, /v1/rerank and /v1/score, or LLM.embed() and LLM.rank()",
        "score": "it scores pairs of texts: /v1/rerank and /v1/score, or LLM.rank()",
    }
    return UnsupportedModelError(f"{model} generates no text here; {uses[task]}")
