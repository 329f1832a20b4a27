"""Every tensor and every key of a GGUF file is used or refused by name, and what is read is the model of the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize

from gguf_files import damaged, export_model, rewrite
from gossamer import LLM, SamplingParams
from gossamer.compress.export import export
from gossamer.errors import CheckpointError, GossamerError, UnsupportedModelError
from gossamer.models.gguf_ends import end_ids
from gossamer.models.load import load_model
from gossamer.models.pull import import_gguf
from gossamer.models.quiet import quiet_transformers
from gossamer.options import ModelOptions
from native_checkpoints import (
    LLAMA3_ROPE,
    VOCAB,
    byte_level,
    dequantized_model,
    divergence,
    save_model,
    write_native,
)

pytestmark = pytest.mark.usefixtures("private_cache")

UINT32, FLOAT32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
BASE = {"rope_theta": 10000.0}
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read(file: Path) -> Any:
    """The model that a file is converted to, in fp32."""
    return load_model(import_gguf(file).path)


def weights_of(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return export_model("llama", tmp_path_factory.mktemp("llama"))[1]


# --- rotary embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        BASE | {"rope_type": "default"},
        BASE | {"rope_type": "linear", "factor": 3.0},
        YARN,
        YARN | {"attention_factor": 1.5},
        LLAMA3_ROPE,
    ],
    ids=["default", "linear", "yarn", "attention", "llama3"],
)
def test_the_frequencies_are_those_of_the_exported_model(rope, tmp_path):
    native, file = export_model("llama", tmp_path, rope_parameters=rope)
    expected, (found, _) = dequantized_model(native), read(file)
    ours, theirs = found.model.rotary_emb, expected.model.rotary_emb
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)
    ids = torch.randint(0, VOCAB, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = expected(ids).logits
        assert divergence(reference, found(ids).logits) < 0.01 * divergence(reference, reference.roll(1, dims=1))


@pytest.mark.parametrize("rope", [YARN | {"attention_factor": 1.5}, LLAMA3_ROPE], ids=["yarn", "llama3"])
@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_all_paths_apply_them(rope, runner, tmp_path):
    native, file = export_model("llama", tmp_path, rope_parameters=rope)
    _, plain = export_model("llama", tmp_path / "plain")
    prompt = {"prompt_token_ids": torch.randint(3, 250, (120,), generator=torch.Generator().manual_seed(1)).tolist()}

    def logprobs(path: Path, **options: Any) -> np.ndarray:
        (score,) = LLM(path, runner=runner, **options).score(prompt, use_tqdm=False)
        return np.array(score.token_logprobs[1:])

    dequantized_model(native).save_pretrained(tmp_path / "source")
    byte_level().save_pretrained(tmp_path / "source")
    source = logprobs(tmp_path / "source")
    other = np.abs(logprobs(plain) - source).mean()
    for weights in ("auto", "int8"):
        assert np.abs(logprobs(file, weights=weights) - source).mean() < 0.15 * other


def test_factors_that_a_file_brings_along_survive_being_exported_again(tmp_path):
    _, file = export_model("llama3", tmp_path)
    native = write_native(import_gguf(file).path, tmp_path / "again")
    again = export(native, tmp_path / "again.gguf", "gguf").path
    np.testing.assert_array_equal(weights_of(again)["rope_freqs.weight"], weights_of(file)["rope_freqs.weight"])


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({"llama__rope__scaling__type": ("su", STRING)}, {}, "llama.rope.scaling.type 'su'"),
        ({"llama__rope__scaling__attn_factor": (1.2, FLOAT32)}, {}, "rope.scaling.attn_factor"),
        (
            {"llama__rope__scaling__type": ("yarn", STRING), "llama__rope__scaling__yarn_ext_factor": (0.5, FLOAT32)},
            {},
            "yarn_ext_factor",
        ),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, "rope_factors_long.weight"),
    ],
)
def test_what_is_not_known_of_rotary_embeddings_is_refused_by_name(keys, tensors, named, llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", tensors=tensors, **keys)
    for weights in ("auto", "int8"):
        with pytest.raises(UnsupportedModelError, match=named):
            LLM(file, weights=weights)


def test_short_and_long_factors_that_differ_are_refused(llama, tmp_path):
    tensors = {
        "rope_factors_short.weight": np.ones(8, np.float32),
        "rope_factors_long.weight": np.full(8, 2, np.float32),
    }
    file = rewrite(llama, tmp_path / "x.gguf", tensors=tensors, llama__rope__scaling__type=("longrope", STRING))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        read(file)


# --- keys and tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", (0.5, FLOAT32)),
        ("residual_scale", (0.2, FLOAT32)),
        ("attention.sliding_window", (128, UINT32)),
        ("expert_count", (8, UINT32)),
        ("no.such.key", (1, UINT32)),
    ],
)
def test_an_unknown_key_is_refused_by_name(key, value, llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", **{f"llama.{key}": value})
    for weights in ("auto", "int8"):
        with pytest.raises(UnsupportedModelError, match=f"llama.{key}"):
            LLM(file, weights=weights)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.1.attn_rot_embd.weight", "output.bias", "odd"])
def test_an_unknown_tensor_is_refused_by_name(name, llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", tensors={name: np.ones(16, np.float32)})
    for weights in ("auto", "int8"):
        with pytest.raises(UnsupportedModelError, match=name):
            LLM(file, weights=weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"drop": ("llama.attention.head_count",)}, "lacks the key llama.attention.head_count"),
        ({"llama__block_count": (10**6, UINT32)}, "block_count is 1000000"),
        ({"llama__embedding_length": (2**31, UINT32)}, "embedding_length is 2147483648"),
        ({"llama__attention__head_count": (0, UINT32)}, "num_attention_heads is 0"),
        ({"llama__attention__head_count_kv": (3, UINT32)}, "does not fit the keys"),
        ({"llama__attention__key_length": (8, UINT32), "drop": ("llama.rope.dimension_count",)}, "value_length"),
        ({"drop": ("token_embd.weight",)}, "lacks the tensor token_embd.weight"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "among them model.layers.1.mlp.up_proj"),
        ({"drop": ("tokenizer.ggml.tokens",)}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__model": ("rwkv", STRING)}, "kind 'rwkv'"),
        ({"tokenizer__ggml__pre": ("of-tomorrow", STRING)}, "'of-tomorrow'"),
        ({"general__architecture": ("mamba", STRING)}, "architecture mamba"),
    ],
)
def test_damaged_and_unknown_values_are_typed_errors(changes, named, llama, tmp_path):
    drop = changes.pop("drop", ())
    file = rewrite(llama, tmp_path / "x.gguf", drop=drop, **changes)
    changes["drop"] = drop
    for weights in ("auto", "int8"):
        with pytest.raises(GossamerError, match=named):
            LLM(file, weights=weights)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_keys_that_may_be_left_out_have_the_usual_values(name, tmp_path):
    changes = {"head_dim": 16} if name == "qwen3" else {}
    native, file = export_model(name, tmp_path, **changes)
    architecture = gguf.GGUFReader(file).fields["general.architecture"].contents()
    drop = ("general.name", f"{architecture}.vocab_size")
    if name in ("llama", "qwen2", "qwen3"):
        drop += tuple(f"{architecture}.{key}" for key in ("attention.key_length", "attention.value_length"))
    found, _ = read(rewrite(file, tmp_path / "x.gguf", drop=drop))
    expected, _ = read(file)
    assert all(torch.equal(weight, expected.state_dict()[key]) for key, weight in found.state_dict().items())
    found.config.name_or_path = expected.config.name_or_path
    assert found.config.to_dict() == expected.config.to_dict()
    source = hf.AutoConfig.from_pretrained(native)
    for field in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(found.config, field) == pytest.approx(getattr(source, field))


@pytest.mark.parametrize(
    ("name", "size"), [("llama", 32), ("mistral", 64), ("qwen3", 64), ("qwen3", 16), ("llama_biases", 32)]
)
def test_heads_of_any_size_and_biases_come_back(name, size, tmp_path):
    native, file = export_model(name, tmp_path, head_dim=size)
    expected = dequantized_model(native)
    ids = torch.randint(0, VOCAB, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = expected(ids).logits
        bound = 0.01 * divergence(reference, reference.roll(1, dims=1))
        for model, _ in (read(file), load_model(file, options=ModelOptions(quantization="int8"))):
            assert model.config.head_dim == size
            assert divergence(reference, model(ids).logits) < 3 * bound


def test_a_bias_that_only_some_layers_have_is_none_in_the_others(tmp_path):
    _, file = export_model("llama_biases", tmp_path)
    names = ("blk.0.attn_q.bias", "blk.1.attn_output.bias", "blk.0.ffn_down.bias")
    model, _ = read(rewrite(file, tmp_path / "x.gguf", drop=names))
    layers = model.model.layers
    absent = (layers[0].self_attn.q_proj, layers[1].self_attn.o_proj, layers[0].mlp.down_proj)
    assert all(not layer.bias.any() for layer in absent)
    assert layers[1].self_attn.q_proj.bias.all() and layers[0].mlp.up_proj.bias.all()


# --- split files -----------------------------------------------------------------------------------------------------


def split(file: Path, directory: Path) -> list[Path]:
    """The file in two parts, as gguf-split writes them."""
    reader = GGUFReader(file)
    names = [tensor.name for tensor in reader.tensors]
    half = len(names) // 2
    parts = []
    for number, drop in enumerate((names[half:], names[:half])):
        keys = {
            "split__no": (number, GGUFValueType.UINT16),
            "split__count": (2, GGUFValueType.UINT16),
            "split__tensors__count": (len(names), GGUFValueType.INT32),
        }
        others = [key for key in reader.fields if number and not key.startswith("GGUF.")]
        target = directory / f"whole-0000{number + 1}-of-00002.gguf"
        parts.append(rewrite(file, target, drop=(*drop, *others), **keys))
    return parts


@pytest.mark.parametrize("given", [0, 1])
def test_a_split_file_is_read_as_a_whole(given, llama, tmp_path):
    parts = split(llama, tmp_path)
    expected, _ = read(llama)
    for model, _ in (read(parts[given]), load_model(parts[given], options=ModelOptions())):
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in expected.state_dict().items())


def test_parts_that_are_missing_or_misnamed_are_said(llama, tmp_path):
    first, second = split(llama, tmp_path)
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="a split GGUF file of 2 parts, but its name says 1"):
        read(tmp_path / "renamed.gguf")
    first.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"part whole-00001-of-00002\.gguf is not beside it"):
        read(second)
    shutil.copy(second, first)
    with pytest.raises(GossamerError, match="part"):
        read(second)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_a_typed_error_or_another_model(llama, tmp_path):
    data = llama.read_bytes()
    header = len(data) - sum(tensor.n_bytes for tensor in GGUFReader(llama).tensors)
    draw = np.random.default_rng(0)
    file = tmp_path / "x.gguf"
    for trial in range(150):
        file.write_bytes(damaged(data, trial, header, draw))
        try:
            with quiet_transformers():
                load_model(file, options=ModelOptions(quantization="int8"))
        except GossamerError as error:
            assert str(file.parent) in str(error) or "model" in str(error)


# --- ends of text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_every_kind_of_end_ends_a_text(key, llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", **{f"tokenizer.ggml.{key}_token_id": (40, UINT32)})
    for weights in ("auto", "int8"):
        params = SamplingParams(temperature=0, max_tokens=4, logit_bias={40: 100})
        (output,) = LLM(file, weights=weights).generate("ab", params, use_tqdm=False)
        assert (list(output.outputs[0].token_ids), output.outputs[0].finish_reason) == ([40], "stop")


def test_ends_are_known_by_their_spelling_as_well():
    tokens = ["a", "<|im_end|>", "<|file_sep|>", "</s>", "<|end|>"]
    assert end_ids({"eos": 3}, tokens) == [3, 2, 1, 4]
    assert 4 not in end_ids({}, [*tokens, "<|return|>", "<|call|>"])


def test_ends_that_no_token_has_are_left_out(llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=(10**6, UINT32))
    assert LLM(file).engine.factory.eos_token_ids == {1}


def test_several_ends_of_a_checkpoint_come_back_from_gguf(tmp_path):
    native = write_native(save_model("llama", tmp_path / "model", eos_token_id=[1, 7, 9]), tmp_path / "int8")
    model, tokenizer = read(export(native, tmp_path / "x.gguf", "gguf").path)
    assert model.generation_config.eos_token_id == [1, 7, 9]
    assert tokenizer.eos_token_id == 1


# --- our own exports come back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"pad_token": "[PAD]"}, {"unk_token": "[UNK]"}, {"pad_token": "[PAD]", "unk_token": "?!"}]
)
def test_special_tokens_without_an_embedding_are_not_named(given, tmp_path):
    model = save_model("llama", tmp_path / "model", vocab_size=390)  # as many rows as the tokenizer has tokens
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens(given)
    tokenizer.save_pretrained(model)
    file = export(write_native(model, tmp_path / "int8"), tmp_path / "x.gguf", "gguf").path
    fields = GGUFReader(file).fields
    assert "tokenizer.ggml.padding_token_id" not in fields and "tokenizer.ggml.unknown_token_id" not in fields
    found, again = read(file)
    assert found.config.vocab_size == 390
    text = "Special tokens\n\nof 12 kinds"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "gemma3"])
def test_an_export_comes_back_with_its_settings_and_its_tokens(name, tmp_path):
    native, file = export_model(name, tmp_path)
    source, tokenizer = hf.AutoConfig.from_pretrained(native), hf.AutoTokenizer.from_pretrained(native)
    found, again = read(file)
    for field in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "head_dim", "attention_bias", "mlp_bias", "layer_types", "sliding_window",
        "query_pre_attn_scalar",
    ):  # fmt: skip
        # GGUF has no window for Mistral.
        if (expected := getattr(source, field, None)) is not None and (name, field) != ("mistral", "sliding_window"):
            assert getattr(found.config, field, None) == pytest.approx(expected), field
    assert again.eos_token_id == tokenizer.eos_token_id
    for text in ("Hello  world\n\n 12 345", "it's\tñandú 🙂 x=3;"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
