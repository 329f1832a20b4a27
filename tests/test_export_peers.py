"""Each export is read by the project whose format it is, and what those projects write is read here.

`make test-peers` runs these where the peers are installed: bitsandbytes, compressed-tensors and xllamacpp (llama.cpp).
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from foreign_checkpoints import quantization_config, read_as_native
from gossamer.compress.export import export
from gossamer.models import bitsandbytes_int8, compressed_tensors_int8, resolve_model
from gossamer.texts import reference_text
from native_checkpoints import (
    byte_level,
    dequantized_model,
    dequantized_tensors,
    divergence,
    quantize_rows,
    save_model,
    write_native,
)

pytestmark = pytest.mark.peers

REAL = ["smollm2-135m", "gemma3-270m"]
KEEP_SOME = ("lm_head", "embed", "wte", "wpe", "moe", "layers.1.mlp.up_proj")


def native_checkpoint(name: str, directory: Path, **changes: Any) -> Path:
    """An int8 checkpoint of a tiny or a real model."""
    source = resolve_model(name) if name in REAL else save_model(name, directory / "model")
    return write_native(source, directory / "int8", **changes)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def token_ids(directory: Path, count: int) -> Tensor:
    return torch.tensor([hf.AutoTokenizer.from_pretrained(directory)(reference_text()[:5000])["input_ids"][:count]])


def load(directory: Path, **options: Any) -> Any:
    model, info = hf.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "smollm2-135m"])
def test_transformers_runs_the_bitsandbytes_export(name, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    native = native_checkpoint(name, tmp_path, keep=KEEP_SOME)
    export(native, tmp_path / "out", "bitsandbytes")
    model = load(tmp_path / "out")
    weights = dequantized_tensors(native)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert layers.keys() == {path.removesuffix(".scale") for path in _names(native) if path.endswith(".scale")}
    for path, layer in layers.items():
        found = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
        torch.testing.assert_close(found, weights[f"{path}.weight"], rtol=1e-6, atol=1e-9)
    if name not in ("gpt2", "mixtral"):  # stored in another shape than the reference has them
        ids = token_ids(native, 128)
        reference = logits(dequantized_model(native), ids)
        assert divergence(reference, logits(model, ids)) < 0.03


def _names(directory: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_what_bitsandbytes_writes_is_read(tmp_path):
    pytest.importorskip("bitsandbytes")
    source = save_model("llama", tmp_path / "model")
    config = hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    hf.AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "theirs")
    settings = bitsandbytes_int8.read_config(quantization_config(tmp_path / "theirs"))
    assert settings == {"threshold": 4.0, "criterion": "absolute", "outliers": "batch", "skip": ["lm_head"]}
    _assert_quantized(read_as_native(tmp_path / "theirs", bitsandbytes_int8), source)


def _assert_quantized(tensors: dict[str, Tensor], source: Path) -> None:
    """Codes and scales are those of our own rounding, but for ties and the peer's float16."""
    original = hf.AutoModelForCausalLM.from_pretrained(source).state_dict()
    layers = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    assert len(layers) == 14
    for path in layers:
        codes, scale = quantize_rows(original[f"{path}.weight"])
        torch.testing.assert_close(tensors[f"{path}.scale"], scale, rtol=1e-3, atol=0)
        assert (tensors[f"{path}.weight"].int() - codes.int()).abs().max() <= 1


# --- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm2-135m"])
def test_compressed_tensors_reads_the_export(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    native = native_checkpoint(name, tmp_path, keep=KEEP_SOME)
    export(native, tmp_path / "out", "compressed-tensors")
    reference_model = dequantized_model(native)
    ids = token_ids(native, 128)
    reference = logits(reference_model, ids)
    # As a plain model: exactly our weights.
    plain = load(tmp_path / "out", quantization_config=hf.CompressedTensorsConfig(dequantize=True))
    weights = reference_model.state_dict()
    assert all(torch.equal(weight, weights[path]) for path, weight in plain.state_dict().items())
    # As it is meant: activations are quantized too.
    quantized = load(tmp_path / "out")
    assert divergence(reference, logits(quantized, ids)) < 0.1
    schemes = {path for path, module in quantized.named_modules() if hasattr(module, "quantization_scheme")}
    assert schemes == {path.removesuffix(".scale") for path in _names(native) if path.endswith(".scale")}


def test_what_compressed_tensors_writes_is_read(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    source = save_model("llama", tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(source)
    scheme = {"config_groups": {"W8A8": ["Linear"]}, "ignore": ["lm_head"], "format": "int-quantized"}
    apply_quantization_config(model, QuantizationConfig.model_validate(scheme))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(quantize_rows(module.weight.data)[1][:, None])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    settings = compressed_tensors_int8.read_config(quantization_config(tmp_path / "theirs"))
    assert (settings["outliers"], settings["skip"]) == (None, ["lm_head"])
    tensors = read_as_native(tmp_path / "theirs", compressed_tensors_int8)
    _assert_quantized(tensors, source)


# --- llama.cpp -------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's server on the loopback device."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def next_token(self, ids: list[int], count: int) -> dict[int, float]:
        """The most probable next tokens with their log-probabilities, the most probable first.

        They are told with the token that is chosen, and not at all if that ends the answer or is a part of a letter. So
        another one is chosen; that changes none of them.
        """
        letter = self.tokenize("a")[-1]
        body = {"prompt": ids, "n_predict": 1, "n_probs": count, "logit_bias": [[letter, 1000]], "cache_prompt": False}
        (entry,) = self.post("/completion", body)["completion_probabilities"]
        assert entry["id"] == letter
        return {token["id"]: token["logprob"] for token in entry["top_logprobs"]}


@contextmanager
def llama_cpp(file: Path) -> Iterator[LlamaCpp]:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)
    yield LlamaCpp(server.listening_address)
    del server


@pytest.mark.parametrize("name", ["llama", "llama_biases", "llama3", "mistral", "qwen2", "qwen3", "gemma3", *REAL])
def test_llama_cpp_runs_the_gguf_export(name, tmp_path):
    native = native_checkpoint(name, tmp_path)
    file = export(native, tmp_path / "model.gguf", "gguf").path
    tokenizer = hf.AutoTokenizer.from_pretrained(native)
    ids = tokenizer(reference_text()[:3000])["input_ids"][:200]
    reference = logits(dequantized_model(native), torch.tensor([ids]))[0].log_softmax(-1)
    with llama_cpp(file) as server:
        assert server.tokenize(reference_text()[:50_000]) == tokenizer(reference_text()[:50_000])["input_ids"]
        for length in (10, 100, 200):
            found = server.next_token(ids[:length], 20)
            expected = reference[length - 1, list(found)]
            # llama.cpp quantizes activations and keeps keys and values in 16 bit.
            assert (expected - torch.tensor(list(found.values()))).abs().mean() < 0.25
            assert expected[0] > reference[length - 1].max() - 0.25


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ((), None),
        (("Digits",), None),
        ((), "llama3"),
        ((), "qwen2"),
    ],
)
def test_llama_cpp_tokenizes_alike(first, words, tmp_path):
    from gguf_files import LLAMA3_WORDS, QWEN2_WORDS

    model = save_model("llama", tmp_path / "model")
    tokenizer = byte_level(*first, words={"llama3": LLAMA3_WORDS, "qwen2": QWEN2_WORDS, None: None}[words])
    tokenizer.save_pretrained(model)
    file = export(write_native(model, tmp_path / "int8"), tmp_path / "model.gguf", "gguf").path
    texts = [reference_text()[60_000:80_000], "it's 12345 IT'S\r\n\n  x\t\t ñandú 中文 🙂 ", "<s>a</s> b"]
    with llama_cpp(file) as server:
        for text in texts:
            assert server.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("metaspace", "prefix"), [(False, False), (True, False), (True, True)])
def test_llama_cpp_tokenizes_alike_by_scores(metaspace, prefix, tmp_path):
    from gguf_files import sentencepiece

    tokenizer = sentencepiece(metaspace=metaspace, prefix=prefix)
    model = save_model("llama", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    file = export(write_native(model, tmp_path / "int8"), tmp_path / "model.gguf", "gguf").path
    texts = [reference_text()[60_000:80_000], "it's 12345 IT'S\n\nx\t\t ñandú 中文 🙂"]
    with llama_cpp(file) as server:
        for text in texts:
            assert server.tokenize(text) == tokenizer(text)["input_ids"]
