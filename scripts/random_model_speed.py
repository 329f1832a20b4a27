"""Decoding a model of random weights: native kernels beside transformers in bf16, steps in turn.

Shapes: `qwen3_moe`, 3 billion weights in experts, of which 0.6 billion are used for a token (random weights choose
experts as evenly as can be, which reads the most of them); `qwen3_5`, 0.75 billion weights, three of four layers gated
delta rules.

    python scripts/random_model_speed.py --shape qwen3_moe --batch 1,16 --prefix 1024 --int8
    python scripts/random_model_speed.py --shape qwen3_5 --batch 1,16 --prefix 1024 --int8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

# name -> configuration, model, and what they are made with
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 640,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def main() -> None:
    import torch
    import transformers

    from gossamer.bench.machine import describe
    from gossamer.engine.engine import Engine
    from gossamer.models.quantize import quantize
    from gossamer.options import EngineOptions
    from gossamer.runners.native import NativeRunner
    from gossamer.runners.transformers import IMPLEMENTATION
    from gossamer.sampling_params import SamplingParams

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_moe")
    parser.add_argument("--layers", type=int, help="fewer, where memory is short")
    parser.add_argument("--int8", action="store_true", help="our weights in int8; otherwise in bf16")
    given = parser.parse_args()
    config_class, model_class, fields = SHAPES[given.shape]
    config = getattr(transformers, config_class)(
        **fields | ({"num_hidden_layers": given.layers} if given.layers else {})
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    rotary = model.model.rotary_emb
    rotary.__init__(config)  # its frequencies are no parameters
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{describe()['cpu']}, {torch.get_num_threads()} threads; {given.shape}, {weights / 1e9:.2f}e9 weights")
    ours: Any = copy.deepcopy(model)
    if given.int8:
        quantize(ours, skip=("lm_head",))
    ours.set_attn_implementation(IMPLEMENTATION)
    runner = NativeRunner(ours, max_rows=2048)
    del ours
    print(f"ours: {runner.isa}, weights of {runner.weight_bytes / 1e9:.2f} GB")
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(0, config.vocab_size, (given.prefix,), generator=generator).tolist()
    for batch in map(int, given.batch.split(",")):
        engine = Engine(runner, None, EngineOptions(speculation="off", memory="3GB"), eos_token_ids=frozenset())
        params = SamplingParams(temperature=0, max_tokens=given.new + 3, ignore_eos=True, detokenize=False)
        for i in range(batch):
            engine.add_request(str(i), {"prompt_token_ids": [*prefix, i, i + 1]}, params)
        while engine.stats.decode_steps < 3:  # prompts, and steps to warm up
            engine.step()
        with torch.inference_mode():
            ids = torch.tensor([[*prefix, i, i + 1] for i in range(batch)])
            cache = transformers.DynamicCache(config=config)
            whole = model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = whole.logits[:, -1].argmax(-1, keepdim=True)
            times: dict[str, list[float]] = {"ours": [], "transformers": []}
            for step in range(given.new):
                start = time.perf_counter()
                engine.step()
                times["ours"].append(time.perf_counter() - start)
                start = time.perf_counter()
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                if step:
                    times["transformers"].append(time.perf_counter() - start)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        kinds = runner.profile().items()
        profile = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in kinds if seconds > 5e-4)
        print(
            f"batch {batch}, prefix {given.prefix}: ours {batch / medians['ours']:.1f} tok/s, transformers bf16 "
            f"{batch / medians['transformers']:.1f} tok/s, {medians['transformers'] / medians['ours']:.2f}x; "
            f"ms: {profile}"
        )


if __name__ == "__main__":
    main()
