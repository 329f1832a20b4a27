"""The decoder blocks of a language model, run one after the other over calibration data.

What is remembered is the hidden state between two blocks: the model is never run as a whole, and each block only as
often as it must be. Blocks are called as the model itself calls them, with the arguments it passed to them (positions,
masks), which are those of all sequences of the same length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.operators.batches import parts_of

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_position")


class _FirstBlockReachedError(Exception):
    pass


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The blocks of a transformers decoder.

    Raises:
        UnsupportedModelError: there is no list of them.
    """
    body = getattr(model, "base_model", model)
    for holder in (body, getattr(body, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            found = getattr(holder, name, None)
            if isinstance(found, nn.ModuleList) and len(found):
                return list(found)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of decoder blocks named layers, h or blocks; pass `blocks`"
    )


def _token_ids(batch: Any) -> Tensor:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else parts_of(batch)[0]
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        raise ConfigurationError("blocks of language models are run on input_ids (B, T), token ids; the batch has none")
    return ids


class BlockRun:
    """Hidden states of calibration data before some block, and how to take them through it.

    Args:
        model: a language model.
        blocks: of it, in the order in which it calls them.
        batches: mappings with ``input_ids`` (B, T), or these tensors themselves, all of one T and without padding;
            other entries are not used.

    Attributes:
        hidden: of each batch, (B, T, D).

    Raises:
        ConfigurationError: there is no batch, lengths differ, or the model does not call all of the blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Any]) -> None:
        if not batches:
            raise ConfigurationError("the loader of calibration data gave no batch")
        texts = [_token_ids(batch) for batch in batches]
        shapes = {tuple(ids.shape) for ids in texts}
        if len(shapes) > 1:
            raise ConfigurationError(f"calibration sequences must be of one length; these are {sorted(shapes)}")
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.hidden: list[Tensor] = []
        self.blocks = blocks
        with torch.no_grad():
            for number, ids in enumerate(texts):
                self._start(model, ids, whole=number == 0)
        if len(self._calls) != len(blocks):
            raise ConfigurationError(f"the model calls {len(self._calls)} of the {len(blocks)} blocks")

    def _start(self, model: nn.Module, ids: Tensor, *, whole: bool) -> None:
        """Remembers what the first block gets; of the first batch also how each block is called."""

        def hook(index: int) -> Any:
            def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index == 0:
                    self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
                if not whole:
                    raise _FirstBlockReachedError
                kept = {key: value for key, value in kwargs.items() if key not in (*_CACHES, "hidden_states")}
                self._calls[index] = (args[1:], kept | ({"use_cache": False} if "use_cache" in kwargs else {}))

            return take

        watched = list(enumerate(self.blocks)) if whole else [(0, self.blocks[0])]
        handles = [block.register_forward_pre_hook(hook(index), with_kwargs=True) for index, block in watched]
        try:
            model(input_ids=ids, use_cache=False)
        except _FirstBlockReachedError:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """One batch through block ``index``."""
        args, kwargs = self._calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def outputs(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """All batches through block ``index``."""
        return [self.forward(index, batch) for batch in hidden]
