"""``adapter_config.json`` of a LoRA adapter as PEFT writes it: which layers it adapts, with which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterError, CheckpointError, ConfigurationError
from gossamer.models.json_file import read_object

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
_LONGEST_NAME = 256

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    }
)
# Fields about training, or about merging, which nothing here does.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
_NEUTRAL_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base model's weights alone


def check_adapter_names(names: Mapping[str, Any], *models: str) -> None:
    """Whether requests can tell adapters from each other and from the model.

    Raises:
        ConfigurationError: a name is none, or the model's own.
    """
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"an adapter's name has 1 to {_LONGEST_NAME} printable characters, got {str(name)[:80]!r}"
            )
        if name in models:
            raise ConfigurationError(
                f"the adapter {name!r} has the model's own name, which stands for the model without an adapter; "
                "give it another"
            )


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter says of itself.

    Attributes:
        rank, alpha: of layers that the patterns say nothing about.
        rslora: the scale is ``alpha / sqrt(rank)`` (arXiv 2312.03732) instead of ``alpha / rank`` (arXiv 2106.09685).
        targets: names of layers, or ends of them; or one regular expression for whole names; or ``"all-linear"``.
        excluded: layers that are not adapted, in the same way.
        layers: only layers of blocks with these numbers.
        blocks: what stands before the number; anything by default.
        ranks, alphas: of layers whose name ends with what a regular expression matches.
        base: the model that it was trained on, as its author called it.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: frozenset[int] = frozenset()
    blocks: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None

    @classmethod
    def read(cls, file: Path) -> LoraConfig:
        """The configuration in a file.

        Raises:
            CheckpointError: the file is missing or damaged.
            AdapterError: it asks for something that is not computed here; names the field.
        """
        found = read_object(file)
        kind = found.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"{file}: peft_type is {kind!r}; adapters of the type 'LORA' can be served")
        _refuse_others(found, file)
        fields = _Fields(found, file)
        rank, alpha = fields.positive("r", 8, whole=True), fields.positive("lora_alpha", 8)
        targets = fields.names("target_modules")
        if not targets:
            raise CheckpointError(f"{file}: target_modules is empty; it has to name the layers that are adapted")
        return cls(
            rank=int(rank),
            alpha=alpha,
            rslora=bool(found.get("use_rslora")),
            targets=targets,
            excluded=fields.names("exclude_modules"),
            layers=fields.numbers("layers_to_transform"),
            blocks=fields.listed("layers_pattern"),
            ranks={key: int(value) for key, value in fields.pattern("rank_pattern", whole=True).items()},
            alphas=fields.pattern("alpha_pattern"),
            base=base if isinstance(base := found.get("base_model_name_or_path"), str) else None,
        )

    def rank_of(self, layer: str) -> int:
        """The rank of a layer's adapter."""
        return self.ranks.get(_key_of(self.ranks, layer), self.rank)

    def scale_of(self, layer: str) -> float:
        """What ``B A x`` is multiplied with.

        >>> LoraConfig(rank=16, alpha=8, rslora=True, targets=("q_proj",)).scale_of("model.layers.0.self_attn.q_proj")
        2.0
        """
        alpha, rank = self.alphas.get(_key_of(self.alphas, layer), self.alpha), self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def adapts(self, layer: str) -> bool:
        """Whether a layer is among the targets; ``"all-linear"`` is not for this method to decide.

        >>> config = LoraConfig(rank=8, alpha=8, rslora=False, targets=("q_proj",), layers=frozenset({1}))
        >>> [config.adapts(f"model.layers.{number}.self_attn.q_proj") for number in (0, 1)]
        [False, True]
        """
        if matches(self.excluded, layer) or not matches(self.targets, layer):
            return False
        return isinstance(self.targets, str) or not self.layers or self._block_of(layer) in self.layers

    def unknown_targets(self, layers: Iterable[str]) -> list[str]:
        """The targets that are none of these layers."""
        names = list(layers)
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return [each for each in targets if not any(self._names(each, layer) for layer in names)]

    def _names(self, target: str, layer: str) -> bool:
        return matches(target if isinstance(self.targets, str) else (target,), layer)

    def _block_of(self, layer: str) -> int | None:
        for before in self.blocks or (r"[^.]*",):
            if found := re.match(rf"(?:^|.*?\.){before}\.(\d+)\.", layer):
                return int(found[1])
        return None


def matches(targets: tuple[str, ...] | str, layer: str) -> bool:
    """Whether a layer is meant: by a regular expression for its whole name, or by names or their ends.

    >>> [matches(targets, "layers.0.q_proj") for targets in (("q_proj",), ("proj",), r".*\\.0\\..*", "q_proj")]
    [True, False, True, False]
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _key_of(patterns: Iterable[str], layer: str) -> str:
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", layer)), layer)


def _refuse_others(found: Mapping[str, Any], file: Path) -> None:
    if found.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias is {found['bias']!r}; adapters that change biases cannot be served")
    start = found.get("init_lora_weights")
    if not any(start is each or (isinstance(each, str) and start == each) for each in _NEUTRAL_STARTS):
        raise AdapterError(
            f"{file}: init_lora_weights is {start!r}, which changes the weights of the model below the adapter; "
            "convert it to a plain LoRA adapter (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in found.items():
        if value and name not in _READ | _WITHOUT_EFFECT:
            raise AdapterError(f"{file}: {name} is {str(value)[:80]}; adapters with {name} cannot be served")


class _Fields:
    """Fields of a configuration, each of the type that it has to be of.

    Raises:
        CheckpointError: it is of another.
    """

    def __init__(self, found: Mapping[str, Any], file: Path) -> None:
        self._found, self._file = found, file

    def positive(self, name: str, default: float, *, whole: bool = False) -> float:
        return self._positive(name, self._found.get(name, default), whole)

    def pattern(self, name: str, *, whole: bool = False) -> dict[str, float]:
        found = self._found.get(name) or {}
        if not isinstance(found, dict):
            raise self._damaged(name, found, "an object of patterns and numbers")
        for each in found:
            self._check_pattern(name, each)
        return {each: self._positive(f"{name}.{each}", value, whole) for each, value in found.items()}

    def names(self, name: str) -> tuple[str, ...] | str:
        found = self._found.get(name)
        if not isinstance(found, str):
            return self.listed(name)
        if found != ALL_LINEAR:
            self._check_pattern(name, found)
        return found

    def listed(self, name: str) -> tuple[str, ...]:
        found = self._found.get(name) or []
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
            raise self._damaged(name, found, "a string or a list of strings")
        if name == "layers_pattern":
            for each in texts:
                self._check_pattern(name, each)
        return tuple(texts)

    def numbers(self, name: str) -> frozenset[int]:
        found = self._found.get(name)
        listed = [] if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
            raise self._damaged(name, found, "a number or a list of numbers")
        return frozenset(listed)

    def _positive(self, name: str, value: Any, whole: bool) -> float:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            raise self._damaged(name, value, f"{'an integer' if whole else 'a number'} greater than 0")
        return value

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{self._file}: {name} has {pattern!r}, no regular expression: {error}") from None

    def _damaged(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {name} is {str(value)[:80]!r}; it has to be {wanted}")
