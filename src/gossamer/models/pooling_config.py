"""How a checkpoint makes one vector of a text: what sentence-transformers writes beside it, read and checked.

``modules.json`` lists the steps: a transformer, a pooling, perhaps a normalization. A checkpoint without that file
pools as sentence-transformers does then: the mean of an encoder's vectors, the last one of a decoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.encoder import is_encoder
from gossamer.models.json_file import read_object

Pooling = Literal["mean", "cls", "lasttoken", "max"]
MODULES = "modules.json"
_LEGACY = {  # fields of 1_Pooling/config.json before sentence-transformers 6
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions begin behind the padding's


@dataclass(frozen=True)
class PoolingConfig:
    """How vectors of tokens become the vector of a text.

    Attributes:
        pooling: ``mean`` of all tokens, their ``max``, the first one's (``cls``) or the last one's (``lasttoken``).
        max_length: the longest text, in tokens.
        lower_case: texts are lower-cased before they are tokenized.
    """

    pooling: Pooling
    max_length: int
    lower_case: bool = False


def makes_embeddings(directory: Path, config: PreTrainedConfig) -> bool:
    """Whether a checkpoint was made to embed texts: an encoder, or one that says how it pools."""
    return is_encoder(config) or (directory / MODULES).is_file()


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is an encoder that scores texts, or pairs of them.

    >>> from transformers import BertConfig
    >>> is_classifier(BertConfig(architectures=["BertForSequenceClassification"])), is_classifier(BertConfig())
    (True, False)
    """
    names = getattr(config, "architectures", None) or ()
    return is_encoder(config) and any(str(name).endswith("ForSequenceClassification") for name in names)


def read_pooling(directory: Path, config: PreTrainedConfig, tokenizer: Any) -> PoolingConfig:
    """How the checkpoint in a directory pools.

    Raises:
        CheckpointError: a file is damaged, or says something that has no meaning.
        UnsupportedModelError: it has a step that is not known here.
    """
    pooling: Pooling = "mean" if is_encoder(config) else "lasttoken"
    if (directory / MODULES).is_file():
        for kind, folder in _modules(directory / MODULES):
            if kind == "Pooling":
                pooling = _pooling(directory / folder / "config.json")
            elif kind not in ("Transformer", "Normalize"):
                raise UnsupportedModelError(
                    f"{directory / MODULES}: a step of type {kind} is not known; Transformer, Pooling and Normalize are"
                )
    said = directory / "sentence_bert_config.json"
    fields = read_object(said) if said.is_file() else {}
    longest = fields.get("max_seq_length")
    if longest is not None and (not isinstance(longest, int) or isinstance(longest, bool) or longest < 1):
        raise CheckpointError(f"{said}: max_seq_length is {longest!r}; it has to be a number of tokens")
    limits = [most for most in (positions(config), tokenizer.model_max_length, longest) if most is not None]
    return PoolingConfig(pooling, int(min(limits)), fields.get("do_lower_case") is True)


def positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that a model has positions for."""
    return int(config.get_text_config().max_position_embeddings) - first_position(config)


def first_position(config: PreTrainedConfig) -> int:
    """The position of a text's first token.

    >>> from transformers import BertConfig, RobertaConfig
    >>> first_position(BertConfig()), first_position(RobertaConfig(pad_token_id=1))
    (0, 2)
    """
    return int(config.pad_token_id or 0) + 1 if config.model_type in _BEHIND_PADDING else 0


def _modules(file: Path) -> list[tuple[str, str]]:
    """Type and folder of each step. A folder lies in the checkpoint, whatever the file says."""
    try:
        steps = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    found = []
    for step in steps if isinstance(steps, list) else [None]:
        kind, folder = (step.get("type"), step.get("path")) if isinstance(step, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise CheckpointError(f"{file} has to be a list of steps, each with a type and a path")
        if folder and (not folder.replace("_", "").isalnum()):
            raise CheckpointError(f"{file}: the path {folder[:80]!r} has to be the name of a folder beside it")
        found.append((kind.rpartition(".")[2], folder))
    return found


def _pooling(file: Path) -> Pooling:
    fields = read_object(file)
    named = fields.get("pooling_mode")
    if named is None:
        named = [name for field, name in _LEGACY.items() if fields.get(field) is True]
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in get_args(Pooling):
        raise UnsupportedModelError(
            f"{file}: it pools by {named!r}; one of {', '.join(get_args(Pooling))} is known, and one at a time"
        )
    mode: Pooling = modes[0]
    return mode
