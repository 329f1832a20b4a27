#!/usr/bin/env bash
# torch.ops.onednn.qlinear_pointwise (x86): unsigned activations times signed weights, sums in 32 bits.
#
# One would guess: the sum of products of 8-bit integers is exact, as that of torch._int_mm is; K = 64 is far from the
# range of int32.
# What happens: on a processor without VNNI, oneDNN adds pairs of products with vpmaddubsw, whose result saturates at 16
# bits. 255 * 127 + 255 * 127 = 64,770 becomes 32,767: the sum is half of what it should be, and nothing says so. The
# script asks oneDNN for AVX2, which has the same effect on newer processors; on one with AVX2 alone nothing needs to be
# asked for. torch._int_mm on the same numbers, less 128, is right.
# Version: torch 2.13.0 (CPU). Source: this script; vpmaddubsw in Intel's instruction set reference.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

K, N = 64, 8
x = torch.full((1, K), 255, dtype=torch.uint8)
weight = torch.full((N, K), 127, dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight, None)
scales, zeros = torch.ones(N), torch.zeros(N, dtype=torch.int64)
found = torch.ops.onednn.qlinear_pointwise(
    x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
)[0, 0].item()
shifted = (x.to(torch.int16) - 128).to(torch.int8)
other = torch._int_mm(shifted, weight.t().contiguous())[0, 0].item() + 128 * 127 * K
right = 255 * 127 * K
print(f"torch {torch.__version__}")
print(f"255 * 127, {K} times: {right:,}; qlinear_pointwise {found:,.0f}, with _int_mm {other:,}")
sys.exit(not (found != right and other == right))
PYTHON
