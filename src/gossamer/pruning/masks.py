"""Masks of pruned weights: holding them while a model is trained, saving and loading them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.errors import CheckpointError, ConfigurationError

MASKS = "masks.safetensors"


class Hold:
    """Keeps pruned weights at zero while an optimizer trains; :meth:`release` ends it. Also a context manager.

    Before a step, gradients are zero where weights are pruned, so that no optimizer learns from them; after it, the
    weights and what the optimizer remembers of them in tensors of their shape (momentum, second moments) are.

    Args:
        masks: parameters and their masks, bool of the parameter's shape; True is kept.
        optimizer: of any kind.

    >>> weight = nn.Parameter(torch.tensor([0.0, 1.0]))
    >>> optimizer = torch.optim.Adam([weight], lr=0.1)
    >>> with Hold([(weight, torch.tensor([False, True]))], optimizer):
    ...     weight.grad = torch.ones(2)
    ...     optimizer.step()
    >>> weight.data
    tensor([0.0000, 0.9000])
    """

    def __init__(self, masks: list[tuple[nn.Parameter, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self._masks, self._optimizer = masks, optimizer
        before: Callable[..., None] = self._before
        after: Callable[..., None] = self._after
        self._handles = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def release(self) -> None:
        """Let the optimizer change all weights again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _before(self, *call: Any) -> None:
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def _after(self, *call: Any) -> None:
        for parameter, mask in self._masks:
            parameter.mul_(mask)
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape and value.is_floating_point():
                    value.mul_(mask)


def save_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Writes masks as safetensors, a bit for each weight; the file appears when it is complete.

    Args:
        path: of the file.
        masks: name of a parameter -> bool, of any shape; True is kept.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_masks(f"{directory}/masks.safetensors", {"weight": torch.tensor([[True, False, True]])})
    ...     load_masks(f"{directory}/masks.safetensors")
    {'weight': tensor([[ True, False,  True]])}
    """
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))
        for name, mask in masks.items()
    }
    shapes = {name: ",".join(map(str, mask.shape)) for name, mask in masks.items()}
    unfinished = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        save_file(packed, unfinished, metadata={"format": "gossamer-masks"} | shapes)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_masks` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    masks = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "gossamer-masks":
                raise CheckpointError(f"{path} holds no masks")
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                shape = [int(part) for part in metadata[name].split(",") if part]
                packed, count = file.get_tensor(name), math.prod(shape)
                if packed.dtype != torch.uint8 or min(shape, default=0) < 0 or packed.numel() != -(-count // 8):
                    raise CheckpointError(
                        f"the mask of {name} in {path} is {packed.dtype} {list(packed.shape)}, which is no bit "
                        f"for each of {shape}; the file is damaged"
                    )
                bits = np.unpackbits(packed.numpy(), bitorder="little", count=count)
                masks[name] = torch.from_numpy(bits.astype(np.bool_)).reshape(shape)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the masks in {path} cannot be read: {error}") from error
    return masks


def check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuses masks that do not belong to the parameters of these shapes.

    Raises:
        ConfigurationError: names the first that does not.
    """
    for name, mask in masks.items():
        if name not in shapes:
            raise ConfigurationError(f"there is a mask of {name}, which is no weight that is pruned here")
        if mask.dtype != torch.bool or mask.shape != shapes[name]:
            raise ConfigurationError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}; the weight needs bool {list(shapes[name])}"
            )


@contextmanager
def trainable(parameters: list[nn.Parameter]) -> Any:
    """Parameters that take gradients in the body, whatever they do outside."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, state in zip(parameters, before, strict=True):
            parameter.requires_grad_(state)
