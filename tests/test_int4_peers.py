"""4-bit files mean the same to the projects whose formats they are in: llama.cpp, and transformers with
compressed-tensors. `make test-peers` runs these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open

import llama_cpp
from gossamer.compress.int4 import Int4Recipe, compress_int4
from gossamer.compress.pack_quantized import w4a16
from gossamer.models.load import load_model
from gossamer.texts import reference_text
from native_checkpoints import save_model

pytestmark = pytest.mark.peers

TEXT = reference_text()[:20_000]
IDS = torch.randint(3, 250, (120,), generator=torch.Generator().manual_seed(1)).tolist()
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_0"])
@pytest.mark.parametrize(("name", "changes"), [("llama", WIDE), ("llama", {}), ("qwen2", WIDE)])
def test_llama_cpp_reads_the_file(name: str, changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "model", **changes)
    file = compress_int4(source, tmp_path / "out.gguf", Int4Recipe(kind, 8, 32), TEXT).path
    expected = llama_cpp.logprobs(file, IDS)
    model, _ = load_model(file, "float32")
    with torch.no_grad():
        logprobs = model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    found = logprobs.gather(1, torch.tensor(IDS)[1:, None])[:, 0].numpy()
    spread = np.abs(expected - np.roll(expected, 1)).mean()
    assert np.abs(found - expected).mean() < 0.15 * spread  # llama.cpp rounds activations to 8 bit, 256 at a time


@pytest.mark.parametrize(("changes", "dtype"), [(WIDE, "bfloat16"), ({}, "float16")])
def test_transformers_reads_the_directory(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = save_model("llama", tmp_path / "model", **changes)
    path = compress_int4(source, tmp_path / "out", Int4Recipe("w4a16", 8, 32), TEXT, dtype=dtype).path
    model, info = hf.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert bool(model(torch.tensor([IDS])).logits.isfinite().all())
    scheme = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    kind = w4a16(scheme["weights"]["group_size"], getattr(torch, dtype))
    weights = model.state_dict()
    with safe_open(path / "model.safetensors", "pt") as stored:
        # (an open safetensors file is no dictionary: it cannot be iterated)
        names = [name.removesuffix("_packed") for name in stored.keys() if name.endswith("_packed")]  # noqa: SIM118
        assert len(names) == 14
        for name in names:
            fields = {
                last: stored.get_tensor(f"{name.removesuffix('weight')}{last}")
                for last in ("weight_packed", "weight_scale")
            }
            assert torch.equal(weights[name], kind.unpack(fields).to(weights[name].dtype)), name
