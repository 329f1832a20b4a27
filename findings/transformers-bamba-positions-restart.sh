#!/usr/bin/env bash
# Bamba, called with a cache and without positions.
#
# One would guess: a decoder that is given a cache counts positions from the tokens that are in it, as Llama does, so
# `position_ids` may be left out when a text is computed in parts.
# What happens: Bamba asks the first layer of its cache how long the text is. That layer is recurrent and counts nothing, so
# every part begins at position 0 again, and its attention layers rotate queries and keys by the wrong angles. Nothing is
# raised; `generate` gives positions, and is right.
# Version: transformers 5.23.0, torch 2.13.0. Source: this script; models/bamba/modeling_bamba.py and cache_utils.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
SMALL = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
BAMBA = dict(
    attn_layer_indices=[1], mamba_n_heads=6, mamba_d_state=8, mamba_d_head=16, mamba_n_groups=2, mamba_chunk_size=16
)
tokens = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, sizes, positions):
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for part in tokens.split(sizes, dim=1):
        given = {"position_ids": torch.arange(start, start + part.shape[1])[None]} if positions else {}
        start += part.shape[1]
        parts.append(model(part, past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(parts, 1)


print("transformers", transformers.__version__, "torch", torch.__version__)
off = {}
for name, make in (
    ("llama", lambda: LlamaForCausalLM(LlamaConfig(**SMALL))),
    ("bamba", lambda: BambaForCausalLM(BambaConfig(**SMALL, **BAMBA))),
):
    torch.manual_seed(0)
    model = make().eval()
    whole = logits(model, [20], positions=True)
    for positions in (True, False):
        off[name, positions] = float((logits(model, [12, 8], positions) - whole).abs().max())
        how = "with" if positions else "without"
        print(f"{name}, in parts of 12 and 8, {how} position_ids: logits are {off[name, positions]:.1e} off those of one call")
surprising = off["bamba", False] > 1e-2 and max(off["bamba", True], off["llama", True], off["llama", False]) < 1e-3
sys.exit(0 if surprising else 1)
PYTHON
