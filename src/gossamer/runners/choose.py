"""Chooses what runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.engine.runner import Runner
from gossamer.errors import UnsupportedModelError
from gossamer.models.lora import Adapter
from gossamer.nn.sparse_int8_linear import dense
from gossamer.options import RunnerOptions
from gossamer.runners.native import NativeRunner, why_not_native
from gossamer.runners.transformers import TransformersRunner


def make_runner(
    network: Any,
    options: RunnerOptions = RunnerOptions(),
    *,
    max_rows: int,
    max_seqs: int | None = None,
    adapters: Sequence[Adapter] = (),
) -> tuple[Runner, str]:
    """A runner, and why it is not the native one: an empty string if it is, or was not wanted.

    The runner of transformers keeps the model's own type of keys and values. It expands layers that are stored without
    their zeros once, unless ``options`` asks to keep them so: then in every step, in less memory.

    Args:
        network: a model of transformers; the native runner takes its weights over.
        options: which runner, and what it does; ``"auto"`` is the native one where it can run the model.
        max_rows: most tokens of a step.
        max_seqs: most sequences that decode together.
        adapters: of the model, that requests may ask for.

    Raises:
        UnsupportedModelError: the native runner was asked for, or is needed for a tolerance of attention to prefixes,
            and cannot run the model.
    """
    choice = options.runner
    reason = "" if choice == "transformers" else why_not_native(network)
    if choice == "native" or (choice == "auto" and not reason):
        try:
            return NativeRunner(network, options, max_rows=max_rows, max_seqs=max_seqs, adapters=adapters), ""
        except UnsupportedModelError as error:
            if choice == "native":
                raise
            reason = str(error)
    if options.batch_invariant:
        raise UnsupportedModelError(f"batch_invariant needs the native runner, which cannot run this model: {reason}")
    if not options.exact:
        raise UnsupportedModelError(f"prefix_eps needs the native runner, which cannot run this model: {reason}")
    if options.sparse_weights != "on":
        dense(network)
    return TransformersRunner(network, adapters), reason
