"""What ``gossamer bench linear`` compares: ways to compute ``x W^T``, each with its own copy of the weight.

A contestant makes its copy from the weight (N, K) in fp32, and gets x in the number format that it is quickest with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.errors import ConfigurationError
from gossamer.kernels.library import instruction_set, using
from gossamer.native.weights import pack_linear
from gossamer.nn import Int8Linear
from gossamer.nn.int8_linear import Decomposition
from gossamer.ops.int8 import quantize_rowwise

Product = Callable[[Tensor], Tensor]

THRESHOLD = 6.0


@dataclass(frozen=True)
class Contestant:
    """A way to compute a linear layer.

    Attributes:
        name: as in the table and in ``--peers``.
        dtype: of x.
        make: from the weight (N, K) fp32 and the columns of the outlier store (S) int64 to the product.
        package: what must be installed beside PyTorch.
    """

    name: str
    dtype: torch.dtype
    make: Callable[[Tensor, Tensor], Product]
    package: str | None = None


def package_version(package: str) -> str | None:
    """The version of a distribution; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _layer(weight: Tensor, decomposition: Decomposition, columns: Tensor | None) -> Int8Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return Int8Linear.from_linear(linear, decomposition=decomposition, outlier_columns=columns)


def _native(layer: Int8Linear) -> Product:
    isa = instruction_set()
    if isa is None:
        raise ConfigurationError("the native kernels are not installed, or switched off")
    return pack_linear([layer], isa, "float32")


def _gossamer(weight: Tensor, columns: Tensor) -> Product:
    return _native(_layer(weight, Decomposition(), columns))


def _gossamer_paper(weight: Tensor, columns: Tensor) -> Product:
    return _native(_layer(weight, Decomposition(THRESHOLD, "absolute", "batch"), None))


def _gossamer_torch(weight: Tensor, columns: Tensor) -> Product:
    return _layer(weight, Decomposition(), columns)


def _torch(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Product]:
    def make(weight: Tensor, columns: Tensor) -> Product:
        own = weight.to(dtype, copy=True)
        return lambda x: linear(x, own)

    return make


def _torch_int_mm(weight: Tensor, columns: Tensor) -> Product:
    """The product of codes alone: x are codes, and no scale is applied to the result."""
    if not torch.cpu._is_vnni_supported():
        raise ConfigurationError(
            "torch._int_mm is a slow loop on this processor, which has no int8 instructions (VNNI)"
        )
    codes, _ = quantize_rowwise(weight)
    return lambda x: torch._int_mm(x, codes.t())


def _bitsandbytes(weight: Tensor, columns: Tensor) -> Product:
    """``Linear8bitLt`` as transformers sets it up for inference. It would convert other types than fp16 to fp16."""
    nn: Any = import_module("bitsandbytes.nn")
    layer = nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    layer.load_state_dict({"weight": weight})
    product: Product = layer.to("cpu").eval()  # this quantizes; in train() it would multiply in floating point
    return product


def _torchao(weight: Tensor, columns: Tensor) -> Product:
    """Int8 weights per row, activations per token, no outliers; compiled, as its documentation says."""
    quantization: Any = import_module("torchao.quantization")
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    holder = torch.nn.Sequential(layer)
    quantization.quantize_(holder, quantization.Int8DynamicActivationInt8WeightConfig())
    product: Product = torch.compile(holder, dynamic=False)
    return product


def with_instruction_set(isa: str) -> Contestant:
    """Ours, as ``isa`` computes it."""

    def make(weight: Tensor, columns: Tensor) -> Product:
        with using(isa):
            return _gossamer(weight, columns)

    return Contestant(f"gossamer-{isa}", torch.float32, make)


OWN = (
    Contestant("gossamer", torch.float32, _gossamer),
    Contestant("gossamer-paper", torch.float32, _gossamer_paper),
    Contestant("gossamer-torch", torch.float32, _gossamer_torch),
)
PEERS = (
    Contestant("torch-fp32", torch.float32, _torch(torch.float32)),
    Contestant("torch-bf16", torch.bfloat16, _torch(torch.bfloat16)),
    Contestant("torch-int-mm", torch.int8, _torch_int_mm),
    Contestant("bitsandbytes", torch.float16, _bitsandbytes, "bitsandbytes"),
    Contestant("torchao", torch.bfloat16, _torchao, "torchao"),
)
PEER_NAMES = tuple(peer.name for peer in PEERS)
