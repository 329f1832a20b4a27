#!/usr/bin/env bash
# Jamba's Mamba layers and a cache, with several tokens at once.
#
# One would guess: a model that has computed some tokens into a cache goes on from them, whether the next come one by one
# or several at once: attention layers do, and so do the recurrent layers of other hybrid models.
# What happens: with several tokens its Mamba layers go on from the inputs of their convolution, but begin with an empty
# state. The logits are others, without an error. One token at a time is right.
# Version: transformers 5.23.0, torch 2.13.0. Source: this script; models/jamba/modeling_jamba.py, where the scan of
# several tokens is given no initial state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DynamicCache, JambaConfig, JambaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

transformers.logging.set_verbosity_error()
SMALL = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
JAMBA = dict(attn_layer_period=3, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=8)
QWEN = dict(
    head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
tokens = torch.arange(3, 15)[None]


@torch.no_grad()
def last_logits(model, sizes):
    cache = DynamicCache(config=model.config)
    for part in tokens.split(sizes, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True).logits
    return logits[0, -1]


print("transformers", transformers.__version__, "torch", torch.__version__)
off = {}
for name, model in (
    ("jamba", JambaForCausalLM(JambaConfig(**SMALL, **JAMBA, use_mamba_kernels=False))),
    ("qwen3_5", Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SMALL, **QWEN))),
):
    torch.manual_seed(0)
    model = model.eval()
    whole = last_logits(model, [12])
    for sizes in ([9, 1, 1, 1], [9, 3]):
        off[name, len(sizes)] = float((last_logits(model, sizes) - whole).abs().max())
        print(f"{name}, in parts of {sizes}: logits are {off[name, len(sizes)]:.1e} off those of one call")
surprising = off["jamba", 2] > 1e-2 and off["jamba", 4] < 1e-3 and off["qwen3_5", 2] < 1e-3
sys.exit(0 if surprising else 1)
PYTHON
