"""Chooses what runs a model."""

from __future__ import annotations

from typing import Any, Literal, get_args

from gossamer.engine.runner import Runner
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.native.sparse_timing import SparseWeights, check_sparse_weights
from gossamer.nn.sparse_int8_linear import dense
from gossamer.runners.native import NativeRunner, why_not_native
from gossamer.runners.tolerance import check_prefix_eps
from gossamer.runners.transformers import TransformersRunner

RunnerChoice = Literal["auto", "native", "transformers"]
KVDtype = Literal["auto", "float32", "bfloat16", "int8"]


def check_runner(choice: str) -> None:
    """Raises :class:`~gossamer.errors.ConfigurationError` for what is no runner."""
    if choice not in get_args(RunnerChoice):
        raise ConfigurationError(f"runner must be {', '.join(map(repr, get_args(RunnerChoice)))}, got {choice!r}")


def check_kv_dtype(kv_dtype: str, runner: str) -> None:
    """Raises :class:`~gossamer.errors.ConfigurationError` for a type that no runner, or not this one, offers."""
    if kv_dtype not in get_args(KVDtype):
        raise ConfigurationError(f"kv_dtype must be {', '.join(map(repr, get_args(KVDtype)))}, got {kv_dtype!r}")
    if kv_dtype != "auto" and runner == "transformers":
        raise ConfigurationError("kv_dtype is for the native runner; that of transformers keeps the model's own type")


def make_runner(
    network: Any,
    choice: RunnerChoice,
    *,
    max_rows: int,
    kv_dtype: KVDtype = "auto",
    sparse_weights: SparseWeights = "auto",
    max_seqs: int | None = None,
    prefix_eps: float = 0.0,
) -> tuple[Runner, str]:
    """A runner, and why it is not the native one: an empty string if it is, or was not wanted.

    Args:
        network: a model of transformers; the native runner takes its weights over.
        choice: ``"auto"`` is the native one where it can run the model, otherwise that of transformers.
        max_rows: most tokens of a step.
        kv_dtype: of keys and values; ``"auto"`` is fp32 for a model in fp32, otherwise bf16. ``"int8"`` halves the
            memory of bf16. The runner of transformers keeps the model's own type.
        sparse_weights: see :class:`~gossamer.runners.native.NativeRunner`. The runner of transformers expands
            layers that are stored without their zeros once, unless this is ``"on"``: then in every step, in less
            memory.
        max_seqs: most sequences that decode together.
        prefix_eps: tolerance of the native runner's attention to long shared prefixes; 0 is exact.

    Raises:
        ConfigurationError: ``kv_dtype``, ``sparse_weights`` or ``choice`` is unknown.
        UnsupportedModelError: the native runner was asked for, or is needed for ``prefix_eps``, and cannot run the
            model.
    """
    check_runner(choice)
    check_kv_dtype(kv_dtype, choice)
    check_sparse_weights(sparse_weights)
    check_prefix_eps(prefix_eps, choice, kv_dtype)
    reason = "" if choice == "transformers" else why_not_native(network)
    if choice == "native" or (choice == "auto" and not reason):
        try:
            native = NativeRunner(
                network,
                max_rows=max_rows,
                kv_dtype=kv_dtype,
                sparse_weights=sparse_weights,
                max_seqs=max_seqs,
                prefix_eps=prefix_eps,
            )
            return native, ""
        except UnsupportedModelError as error:
            if choice == "native":
                raise
            reason = str(error)
    if prefix_eps:
        raise UnsupportedModelError(f"prefix_eps needs the native runner, which cannot run this model: {reason}")
    if sparse_weights != "on":
        dense(network)
    return TransformersRunner(network), reason
