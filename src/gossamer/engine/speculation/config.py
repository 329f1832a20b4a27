"""What may be drafted: the settings, in vLLM's words where it has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from gossamer.engine.speculation.matches import LEAST
from gossamer.engine.speculation.survival import Source
from gossamer.errors import ConfigurationError

MOST = 64  # tokens of a draft that may be asked for
_USUAL = 32
_METHODS = {
    "auto": frozenset(Source),
    "ngram": frozenset({Source.PREDICTION, Source.GRAMMAR, Source.OWN, Source.PREFIX}),
    "suffix": frozenset(Source),
}


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Bounds on drafts, by vLLM's names (``vllm.config.SpeculativeConfig``).

    Args:
        method: ``"ngram"`` drafts from a request's own prompt and output, ``"suffix"`` and ``"auto"`` from those of
            others of the same ``cache_salt`` as well. A prediction and tokens that a grammar forces are drafted anyway.
        num_speculative_tokens: of a draft at most; 0 is none.
        prompt_lookup_min: tokens that have to match before a draft; less than 2 is 2.
        suffix_decoding_max_spec_factor: tokens of a draft at most, as a multiple of those that match.
        suffix_decoding_min_token_prob: drafts end where the probability that they are right so far falls below it.

    Raises:
        ConfigurationError: names the field, and what it may be.

    >>> SpeculativeConfig.of('{"method": "ngram", "num_speculative_tokens": 5}').num_speculative_tokens
    5
    """

    method: str = "auto"
    num_speculative_tokens: int = _USUAL
    prompt_lookup_min: int = LEAST
    suffix_decoding_max_spec_factor: float | None = None
    suffix_decoding_min_token_prob: float = 0.0

    def __post_init__(self) -> None:
        most, least = self.num_speculative_tokens, self.prompt_lookup_min
        factor, share = self.suffix_decoding_max_spec_factor, self.suffix_decoding_min_token_prob
        if not isinstance(self.method, str) or self.method not in _METHODS:
            raise _refusal("method", self.method, f"one of {', '.join(map(repr, _METHODS))}")
        if not _is_number(most, int) or not 0 <= most <= MOST:
            raise _refusal("num_speculative_tokens", most, f"an integer from 0 to {MOST}")
        if not _is_number(least, int) or least < 1:
            raise _refusal("prompt_lookup_min", least, "an integer of at least 1")
        if factor is not None and not (_is_number(factor, int, float) and 0 < factor <= MOST):
            raise _refusal("suffix_decoding_max_spec_factor", factor, f"a number greater than 0, {MOST} at most")
        if not (_is_number(share, int, float) and 0 <= share <= 1):
            raise _refusal("suffix_decoding_min_token_prob", share, "a number from 0 to 1")

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | None) -> Self:
        """From a mapping, or the JSON of one.

        Raises:
            ConfigurationError: as above; or it is no such mapping, or has a key that is not understood.
        """
        try:
            value = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"speculative_config is no JSON: {error}") from None
        if not isinstance(value, Mapping | None):
            raise ConfigurationError(f"speculative_config must be a JSON object, got {given!r}")
        known = [each.name for each in fields(cls)]
        for name in value or {}:
            if name not in known:
                raise ConfigurationError(
                    f"speculative_config.{name} is not known here; the keys are {', '.join(known)}"
                )
        return cls(**(value or {}))

    @property
    def sources(self) -> frozenset[Source]:
        """What drafts may be taken from."""
        return _METHODS[self.method]

    def most(self, length: int) -> int:
        """Tokens of a draft at most, behind a match of so many."""
        factor = self.suffix_decoding_max_spec_factor
        most = self.num_speculative_tokens
        return most if factor is None else min(most, int(factor * length))


def _is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _refusal(name: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"speculative_config.{name} must be {expected}, got {value!r}")
