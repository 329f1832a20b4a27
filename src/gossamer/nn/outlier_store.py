"""Which input columns of a layer are worth 16-bit weights: found by watching the model, without any data.

The few large features of transformers stand in the same columns for nearly all tokens (Dettmers et al. 2022, arXiv
2208.07339, section 4), and an error in a weight counts by the size of what it is multiplied with: the expected error of
an output is ``sum_k E[x_k^2] dW_k^2``. So the columns with the largest ``E[x^2]`` are kept, as the model shows them
when it reads random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WATCHED_TOKENS = 64  # at a time: what a model computes for more of them would take more memory than loading it
READINGS = 6
HEAD_TOKENS = 16  # of a reading, whose logits are computed


def store_size(in_features: int, share: float) -> int:
    """How many of ``in_features`` columns a store of ``share`` holds.

    >>> store_size(576, 0.015), store_size(576, 0.0)
    (9, 0)
    """
    return round(in_features * share)


def find_outlier_columns(layers: Mapping[str, nn.Module], share: float, run: Callable[[], object]) -> dict[str, Tensor]:
    """The columns with the largest mean square of each layer's input while ``run`` runs the model.

    Args:
        layers: by name; linear layers of any kind, with ``in_features`` or a ``weight`` (K, N).
        share: of the columns of each layer, 0 to 1.
        run: calls the model, once or more. The first position of a sequence is left out: models attend to it in ways
            of their own, with inputs that no other position has.

    Returns:
        By name of the layer, (S) int64 in ascending order. A layer that was not called, such as an expert that no
        token was sent to, gets its first columns: as many as any, and nothing is known of them.
    """
    energy: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            x = x[..., 1:, :] if x.dim() > 2 else x
            total = x.reshape(-1, x.shape[-1]).float().nan_to_num().square().sum(0)
            energy[name] = energy[name] + total if name in energy else total

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _largest(energy.get(name), _in_features(layer), share) for name, layer in layers.items()}


def _largest(energy: Tensor | None, in_features: int, share: float) -> Tensor:
    size = store_size(in_features, share)
    return torch.arange(size) if energy is None else energy.topk(size).indices.sort().values


def _in_features(layer: Any) -> int:
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def random_reading(model: nn.Module, *, head: bool = False) -> Callable[[], object] | None:
    """A function that has a causal language model of transformers read random tokens; ``None`` for other models.

    The output layer is left out, since its logits would be the largest tensor of all; with ``head`` it computes those
    of a few tokens.
    """
    config: Any = getattr(model, "config", None)
    causal = hasattr(config, "get_text_config") and getattr(model, "can_generate", bool)()
    if not causal or config.is_encoder_decoder:
        return None
    text = config.get_text_config()
    length = min(WATCHED_TOKENS, getattr(text, "max_position_embeddings", None) or WATCHED_TOKENS)
    body: Any = model if head else getattr(model, "base_model", model)
    kept = {"logits_to_keep": HEAD_TOKENS} if head else {}

    def read() -> None:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        training = model.training
        model.eval()
        try:
            with own_attention(model):
                for _ in range(READINGS):
                    tokens = torch.randint(text.vocab_size, (1, length), generator=generator)
                    body(input_ids=tokens.to(device), use_cache=False, **kept)
        finally:
            model.train(training)

    return read


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let a transformers model attend as it does by itself; the engine's function works inside of its steps only."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
