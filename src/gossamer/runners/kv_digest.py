"""What tells the keys and values of one model, computed in one way, from all others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version

from gossamer.kernels.library import instruction_set
from gossamer.models.weights_digest import weights_digest
from gossamer.options import ModelOptions, RunnerOptions
from gossamer.runners.loading import LoadedModel

_PACKAGES = ("gossamer", "torch", "transformers")


def kv_digest(loaded: LoadedModel, model: ModelOptions, runner: RunnerOptions) -> str:
    """A digest of all that decides about keys and values: the weights, what they are computed as, and by what.

    It is made of the options as they were given. Two ways to ask for the same have two digests, which costs a prefix
    computed twice; keys and values that differ by their rounding alone have two as well.

    Args:
        loaded: the model.
        model, runner: what was asked for when it was loaded.

    Raises:
        OSError: the model's files cannot be read any more.
    """
    layout = loaded.runner.layout
    parts = {
        "weights": weights_digest(loaded.path),
        "computed as": loaded.weights,
        "runner": loaded.runner.name,
        "instructions": instruction_set(),
        "layers": [asdict(layer) for layer in layout.layers],
        "dtype": str(layout.dtype),
        "options": [asdict(model), asdict(runner)],
        "versions": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
