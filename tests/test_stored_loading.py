"""GGUF files are loaded as they are stored: the same model, in the file's own bytes, or a typed error."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import nn
from typer.testing import CliRunner

import gossamer.runners.choose
from gguf_files import damaged, export_model, rewrite, write_model
from gossamer import LLM, SamplingParams
from gossamer.cli.app import app
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.models.cache import cache_directory
from gossamer.models.load import load_model
from gossamer.models.manifest import write_manifest
from gossamer.nn import StoredEmbedding, StoredLinear
from gossamer.options import ModelOptions, RunnerOptions
from gossamer.runners.loading import load_for_runner, load_network, weights_of
from stored_blocks import GGUF_TYPES, put_scale, q4_k_m, random_blocks, random_rows, store, values_in
from test_gguf_reading import split

pytestmark = pytest.mark.usefixtures("private_cache")

SIZES = {"hidden_size": 256, "intermediate_size": 512}
IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
STORED, DEQUANTIZED = ModelOptions(weights="as-stored"), ModelOptions(weights="dequantized")


def read(file: Path, options: ModelOptions = STORED) -> Any:
    return load_model(file, options=options)[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stored_layers(model: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if isinstance(each, StoredLinear | StoredEmbedding)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Permuted rows, and a tied output layer."""
    directory = tmp_path_factory.mktemp("llama")
    return store(export_model("llama", directory, **SIZES)[1], directory / "mixed.gguf", q4_k_m)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama_biases", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("mistral", {}),
        ("gemma3", {}),
    ],
)
def test_it_is_the_model_of_the_dequantized_weights(name, changes, tmp_path):
    source = export_model(name, tmp_path, **SIZES | changes)[1]
    file = store(source, tmp_path / "mixed.gguf", q4_k_m)
    model, expected = read(file), read(file, DEQUANTIZED)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    layers = stored_layers(model)
    for path, layer in layers.items():
        assert torch.equal(layer.stored.dequantize(), expected.get_submodule(path).weight), path
    rest = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    assert not rest and all(weight.dtype == torch.float32 for weight in model.parameters())
    linear = sum(type(each) is nn.Linear for each in expected.modules())
    assert len(layers) == linear + 1
    assert (model.lm_head.stored is model.model.embed_tokens.stored) == expected.config.tie_word_embeddings
    assert model.config.gguf_file_type == expected.config.gguf_file_type
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_every_type_of_blocks(type, llama, tmp_path):
    file = store(llama, tmp_path / "x.gguf", type)
    model = read(file)
    assert {layer.stored.type for layer in stored_layers(model).values()} == {type}
    torch.testing.assert_close(logits(model), logits(read(file, DEQUANTIZED)), rtol=1e-4, atol=1e-4)
    assert weights_of(model) == f"as stored: {type} 15"


def test_what_is_no_blocks_becomes_float32(llama, tmp_path):
    kinds = {"blk.0.attn_q.weight": np.float16, "blk.1.ffn_down.weight": np.float32, "token_embd.weight": np.float16}
    values = values_in(llama)
    file = rewrite(llama, tmp_path / "x.gguf", tensors={name: values[name].astype(k) for name, k in kinds.items()})
    model = read(file)
    layers = model.model.layers
    for layer in (layers[0].self_attn.q_proj, layers[1].mlp.down_proj, model.lm_head):
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32
    assert type(model.model.embed_tokens) is nn.Embedding and model.lm_head.weight is model.model.embed_tokens.weight
    assert len(stored_layers(model)) == 12
    torch.testing.assert_close(logits(model), logits(read(file, DEQUANTIZED)), rtol=1e-4, atol=1e-4)


def test_rows_that_are_in_order_are_views_of_the_file(llama):
    layers = stored_layers(read(llama))
    moved = {name for name, layer in layers.items() if not layer.stored.mapped}
    assert moved and all(name.endswith((".q_proj", ".k_proj")) for name in moved)


@pytest.mark.parametrize("given", [0, 1])
def test_a_split_file_is_used_as_a_whole(given, llama, tmp_path):
    parts = split(llama, tmp_path)
    model = read(parts[given])
    assert torch.equal(logits(model), logits(read(llama)))
    assert weights_of(model) == weights_of(read(llama))


def test_nothing_is_held_twice(llama, tmp_path):
    """In a process of its own: 40 million weights, 160 MB in float32, take what 4 bits of them would not even need."""
    file = write_model_of_size(tmp_path / "x.gguf")
    script = (
        "import sys\n"
        "from gossamer.models.load import load_model\n"
        "from gossamer.options import ModelOptions\n"
        "def held():\n"
        "    fields = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)\n"
        "    return int(fields['RssAnon'].split()[0]) * 1024\n"
        "load_model(sys.argv[1], options=ModelOptions(weights='as-stored'))\n"  # what libraries allocate once
        "before = held()\n"
        "model, _ = load_model(sys.argv[2], options=ModelOptions(weights='as-stored'))\n"
        "layers = [each for each in model.modules() if hasattr(each, 'stored')]\n"
        "print(held() - before, sum(each.stored.shape.numel() for each in layers))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, llama, file], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 40_000_000 and grown < 8_000_000


def write_model_of_size(path: Path) -> Path:
    import transformers as hf

    config = hf.Qwen3Config(
        vocab_size=2000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    small = path.with_name("small.gguf")
    with torch.device("cpu"):
        write_model(hf.Qwen3ForCausalLM(config), gguf.MODEL_ARCH.QWEN3, small, {"rope.freq_base": 1e4}, 2000)
    return store(small, path, "Q4_0")


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [STORED, DEQUANTIZED, ModelOptions(weights="int8")], ids=lambda o: o.weights)
@pytest.mark.parametrize(
    ("tensor", "type", "scale"), [("blk.1.attn_v.weight", "Q6_K", np.nan), ("token_embd.weight", "Q4_K", -np.inf)]
)
def test_a_scale_that_is_no_number_is_named_with_its_place(tensor, type, scale, options, llama, tmp_path):
    (shape,) = (tuple(map(int, each.shape))[::-1] for each in GGUFReader(llama).tensors if each.name == tensor)
    rows = random_rows(type, shape)
    put_scale(rows.reshape(-1, random_blocks(type, 1).shape[1])[11:12], {"Q6_K": 208, "Q4_K": 2}[type], scale)
    kind = GGMLQuantizationType[type]
    file = rewrite(llama, tmp_path / "x.gguf", tensors={tensor: (rows, kind)})
    start = next(each.data_offset for each in GGUFReader(file).tensors if each.name == tensor)
    place = int(start) + 11 * gguf.GGML_QUANT_SIZES[kind][1]
    with pytest.raises(CheckpointError, match=rf"x\.gguf: {tensor} has a block .* at byte {place} of the file"):
        read(file, options)


def test_tensors_that_are_missing_or_do_not_fit_are_named(llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", drop=("blk.1.ffn_up.weight",))
    with pytest.raises(CheckpointError, match=r"x\.gguf lack 1 tensors, among them model.layers.1.mlp.up_proj.weight"):
        read(file)
    wide = (random_rows("Q4_0", (512, 512)), GGMLQuantizationType.Q4_0)
    file = rewrite(llama, tmp_path / "x.gguf", tensors={"blk.0.ffn_up.weight": wide})
    with pytest.raises(CheckpointError, match=r"x\.gguf.* model.layers.0.mlp.up_proj.weight is \[512, 512\]"):
        read(file)


def test_types_that_are_not_computed_with_are_named(llama, tmp_path):
    kind = GGMLQuantizationType.IQ3_S
    rows = np.zeros((512, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    file = rewrite(llama, tmp_path / "x.gguf", tensors={"blk.0.ffn_up.weight": (rows, kind)})
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf .* blk.0.ffn_up.weight is stored as IQ3_S"):
        read(file)
    assert read(file, DEQUANTIZED).model.layers[0].mlp.up_proj.weight.count_nonzero() == 0
    loaded = load_for_runner(file, max_rows=8)
    assert "IQ3_S" in loaded.weights_note and loaded.weights == "float32" and loaded.runner.name == "native"


def test_files_without_blocks_are_refused_only_when_blocks_are_asked_for(llama, tiny, tmp_path):
    plain = {name: value for name, value in values_in(llama).items() if value.ndim == 2}
    file = rewrite(llama, tmp_path / "x.gguf", tensors=plain, general__file_type=(0, gguf.GGUFValueType.UINT32))
    with pytest.raises(UnsupportedModelError, match=r"none of its tensors is in quantized blocks \(F32\)"):
        read(file)
    with pytest.raises(UnsupportedModelError, match="none of the weights is in 4-bit blocks"):
        read(tiny)
    loaded = load_for_runner(file, max_rows=8)
    assert loaded.weights == "float32" and not loaded.weights_note


@pytest.mark.parametrize(
    "others",
    [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"quantization": "int8"}, {"int8_head": True}],
    ids=lambda others: next(iter(others)),
)
def test_contradictions_are_refused_before_anything_is_read(others):
    with pytest.raises(ConfigurationError, match=f"as-stored.*{next(iter(others))}"):
        LLM("no such model", weights="as-stored", **others)
    assert not ModelOptions(**others).may_stay_stored and ModelOptions().may_stay_stored


def test_int8_is_said_in_either_way(llama):
    assert ModelOptions(weights="int8").int8 and ModelOptions(quantization="int8", weights="int8").int8
    first, second = (LLM(llama, **{name: "int8"}) for name in ("weights", "quantization"))
    assert first.weights == second.weights == "int8" and first.model_path == llama
    with pytest.raises(ConfigurationError, match="exclude each other"):
        ModelOptions(weights="dequantized", quantization="int8")
    with pytest.raises(ConfigurationError, match="weights must be 'auto', 'as-stored'"):
        ModelOptions(weights="stored")  # type: ignore[arg-type]  # wrong on purpose


def test_what_is_int8_already_stays_as_it_is(llama, tmp_path):
    file = store(llama, tmp_path / "x.gguf", "Q8_0")
    int8 = ModelOptions(quantization="int8")
    for options in (int8, replace(int8, int8_head=True)):
        assert load_for_runner(file, options, max_rows=8).weights == "as stored: Q8_0 15"
        assert weights_of(load_network(file, options)[0]) == "as stored: Q8_0 15"
    for options, runner in (
        (replace(int8, int8_threshold=5.0), "auto"),
        (replace(int8, int8_outliers=None), "auto"),
        (ModelOptions(weights="int8"), "auto"),
        (int8, "transformers"),
    ):
        loaded = load_for_runner(file, options, RunnerOptions(runner=runner), max_rows=8)
        assert (loaded.weights, loaded.path) == ("int8", file)
    assert not cache_directory().exists()


# --- which weights, and what runs them -------------------------------------------------------------------------------


def refuse_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native runner as it is without kernels for blocks."""
    whole = gossamer.runners.choose.NativeRunner

    def make(network: Any, *arguments: Any, **options: Any) -> Any:
        if stored_layers(network):
            raise UnsupportedModelError("there are no kernels for blocks")
        return whole(network, *arguments, **options)

    monkeypatch.setattr(gossamer.runners.choose, "NativeRunner", make)


def test_weights_that_cannot_be_run_natively_are_dequantized_with_a_note(llama, monkeypatch):
    refuse_blocks(monkeypatch)
    llm = LLM(llama)
    assert (llm.weights, llm.weights_note) == ("float32", "there are no kernels for blocks")
    assert llm.engine.runner.name == "native" and not llm.runner_note
    assert llm.model_path.parent == cache_directory() / "models" and llm.stored_weights == "Q8_0"


def test_asked_for_they_are_run_by_transformers_or_not_at_all(llama, monkeypatch):
    refuse_blocks(monkeypatch)
    llm = LLM(llama, weights="as-stored")
    assert llm.weights == "as stored: Q4_K 6, Q6_K 3, Q5_0 2, Q8_0 2, Q5_K 2" and not llm.weights_note
    assert llm.engine.runner.name == "transformers" and "no kernels" in llm.runner_note
    with pytest.raises(UnsupportedModelError, match="no kernels"):
        LLM(llama, weights="as-stored", runner="native")
    assert not cache_directory().exists()


@pytest.mark.parametrize(
    ("model", "runner"),
    [
        (ModelOptions(), RunnerOptions(runner="transformers")),
        (ModelOptions(dtype="float32"), RunnerOptions()),
        (ModelOptions(int8_head=True), RunnerOptions()),
        (DEQUANTIZED, RunnerOptions()),
    ],
)
def test_what_else_is_asked_for_decides(model, runner, llama):
    loaded = load_for_runner(llama, model, runner, max_rows=8)
    assert loaded.path.is_dir() and not loaded.weights_note and "stored" not in loaded.weights


def test_greedy_tokens_are_those_of_the_dequantized_weights(llama):
    prompts = [{"prompt_token_ids": [5, 6, 7, *range(9, 40), last]} for last in (8, 9, 10)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def tokens(**options: Any) -> list[Any]:
        outputs = LLM(llama, runner="transformers", **options).generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    assert tokens(weights="as-stored") == tokens(weights="dequantized")


def test_stored_weights_are_not_read_to_see_what_a_model_stores(llama, monkeypatch):
    monkeypatch.setattr("gossamer.nn.StoredMatrix.dequantize", lambda *_: pytest.fail("weights were read"))
    assert LLM(llama, weights="as-stored", runner="transformers").engine.runner.vocab_size == 400


def test_models_without_a_runner_stay_stored_too(llama):
    network, _ = load_network(llama)
    assert "as stored" in weights_of(network) and not cache_directory().exists()
    assert weights_of(load_network(llama, DEQUANTIZED)[0]) == "float32"


def test_commands_say_what_they_compute_with(llama, tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 40)
    results = {}
    for weights in ("as-stored", "dequantized"):
        arguments = ["eval", str(llama), "--text", str(text), "--window", "50", "--weights", weights, "--json"]
        results[weights] = json.loads(CliRunner().invoke(app, arguments).stdout)
    stored, plain = results["as-stored"], results["dequantized"]
    assert stored["computed"].startswith("as stored: Q4_K 6") and plain["computed"] == "float32"
    assert stored["nll"] == pytest.approx(plain["nll"], rel=1e-5)


def test_a_file_that_the_catalogue_keeps_brings_its_sampling(llama, tmp_path):
    (tmp_path / "kept.gguf").write_bytes(llama.read_bytes())
    write_manifest(tmp_path, {"kept": "kept.gguf", "sampling": {"temperature": 0.7, "top_k": 20}})
    for options in (STORED, DEQUANTIZED):
        settings = read(tmp_path / "kept.gguf", options).generation_config
        assert (settings.temperature, settings.top_k, settings.do_sample) == (0.7, 20, True)
    assert read(llama).generation_config.top_k != 20


def test_loading_can_be_interrupted(llama, monkeypatch):
    def interrupt(tensor: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.models.gguf_file.GGUFTensor.check_scales", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LLM(llama)
    assert not cache_directory().exists()


def test_a_damaged_file_is_a_typed_error_or_another_model(llama, tmp_path):
    data = llama.read_bytes()
    header = len(data) - sum(int(tensor.n_bytes) for tensor in GGUFReader(llama).tensors)
    draw = np.random.default_rng(0)
    file = tmp_path / "x.gguf"
    for trial in range(60):
        file.write_bytes(damaged(data, trial, header if trial % 2 else len(data), draw))
        try:
            read(file)
        except GossamerError as error:
            assert str(file.parent) in str(error) or "model" in str(error)
