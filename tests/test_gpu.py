"""On a GPU: the runner of transformers, the operators, the int8 reference. `make test-gpu`; skipped elsewhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from architectures import make_model, reference
from gossamer.engine.engine import Engine
from gossamer.models.quantize import quantize
from gossamer.ops.attention import AttentionState, attend, attend_prefix, attend_ragged, merge_states
from gossamer.ops.int8 import int8_linear, quantize_columnwise
from gossamer.options import SHARING_MODES, EngineOptions
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from test_exactness import TREES, NumberTokenizer, answers, prompts_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 is fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_moe", "qwen3_5", "lfm2", "mamba2"])
def test_greedy_tokens_equal_those_on_the_processor(name: str, sharing: Any) -> None:
    """Cold and warm, in chunks."""
    model = make_model(name)
    prompts = [prompt for tree in TREES for prompt in prompts_of(tree, random.Random(name))]
    generate = reference(model)
    expected = [generate(prompt, 8) for prompt in prompts]
    model.set_attn_implementation(IMPLEMENTATION)
    runner = TransformersRunner(model.to("cuda"))
    engine = Engine(runner, NumberTokenizer(), EngineOptions(sharing=sharing, max_num_batched_tokens=37))
    assert engine.tree.layout.device.type == "cuda"
    for _ in range(2):
        assert answers(engine, prompts, 8) == expected


def test_int8_logits_are_those_of_the_processor() -> None:
    model = make_model("llama", hidden_size=64)
    quantize(model, skip=("lm_head",))
    tokens = torch.arange(3, 40)[None]
    expected = model(tokens).logits
    found = model.to("cuda")(tokens.to("cuda")).logits.cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("outliers", ["batch", "token", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_int8_product_is_that_of_the_processor(outliers: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 128)
    x[:, 5] *= 60
    weight, scale = quantize_columnwise(torch.randn(128, 64))
    both = [
        int8_linear(
            x.to(device, dtype), weight.T.contiguous().to(device), scale.to(device), threshold=6.0, outliers=outliers
        )
        for device in ("cpu", "cuda")
    ]
    assert (both[0].float() - both[1].cpu().float()).abs().max() <= 0.02 * both[0].float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_states_merge_to_attention_to_all_keys(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, h, n, 64, generator=generator) for h, n in ((8, 1), (2, 300), (2, 300)))
    whole = attend(query.double(), key.double(), value.double())
    on = [each.to("cuda", dtype) for each in (query, key, value)]
    prefix = attend_prefix(on[0], on[1][0, :, :200], on[2][0, :, :200])
    bias = torch.zeros(3, 100, device="cuda")
    own = attend_ragged(on[0], on[1][:, :, 200:], on[2][:, :, 200:], bias)
    first = AttentionState(prefix.out[:1], prefix.lse[:1])
    merged = merge_states([first, AttentionState(own.out[:1], own.lse[:1])])
    error = (merged.out.cpu().double() - whole.out[:1]).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
