#!/usr/bin/env bash
# Nemotron-H's Mamba layers: a token computed alone, and the same token among others.
#
# One would guess: with a cache, tokens that come one by one get the logits that they get all at once, up to rounding, so
# that what is verified or prefilled in chunks may be compared with what is decoded.
# What happens: where several tokens are computed, the steps of the recurrence are at least `time_step_min`; where there is
# only one, they may be smaller. States and logits differ far beyond rounding, in float64 as well. With `time_step_min` 0
# both agree.
# Version: transformers 5.23.0, torch 2.13.0. Source: this script; models/nemotron_h/modeling_nemotron_h.py, where
# `time_step_limit` is given to the scan of several tokens, and not to the update by one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

transformers.logging.set_verbosity_error()
SMALL = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=4, hybrid_override_pattern="M*-M", head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, ssm_state_size=8, mamba_num_heads=6, mamba_head_dim=16, n_groups=2,
    chunk_size=16, initializer_range=0.3, pad_token_id=0,
)  # fmt: skip
tokens = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logprobs(model, sizes):
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(sizes, dim=1)]
    return torch.cat(parts, 1)[0].log_softmax(-1)


print("transformers", transformers.__version__, "torch", torch.__version__)
off = {}
for least in (0.001, 0.0):
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SMALL)).double().eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (least, float("inf"))
    whole = logprobs(model, [40])
    for name, sizes in (("one by one", [1] * 40), ("33, then 7 at once", [33, 7])):
        off[least, name] = float((logprobs(model, sizes) - whole).abs().max())
        print(f"steps of at least {least}, {name}: log-probabilities are {off[least, name]:.1e} off those of one call")
surprising = (
    off[0.001, "one by one"] > 1e-3 and off[0.001, "33, then 7 at once"] < 1e-4 and off[0.0, "one by one"] < 1e-4
)
sys.exit(0 if surprising else 1)
PYTHON
