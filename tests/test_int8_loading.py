"""Checkpoints become int8 while they are read, in little memory, from safetensors and GGUF; or say why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from architectures import make_model
from forked import run_program
from gossamer import LLM, GossamerInt8Config, SamplingParams
from gossamer.cli.app import app
from gossamer.compress.export import export
from gossamer.compress.int8 import compress_int8
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.models.load import load_model
from gossamer.models.manifest import verify
from gossamer.models.pull import import_gguf
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Linear
from gossamer.nn.experts import separate_experts
from gossamer.nn.int8_linear import Decomposition
from native_checkpoints import save_model
from references import load_reference

MEMORY_SLACK = 64e6  # bytes of anonymous memory beside the int8 model

# Loads the model given as an argument and prints by how many bytes anonymous memory grew at most, and the model's size.
LOAD_AND_WATCH = """
import json, re, sys, threading, time
from pathlib import Path
import torch, gguf
from gossamer.models.int8_quantizer import GossamerInt8Config
from gossamer.models.load import load_model
from gossamer.nn import Int8Linear

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

load_model(sys.argv[1], quantization=GossamerInt8Config())  # whatever the libraries allocate on first use
before = anonymous()
peak, done = before, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model, _ = load_model(sys.argv[2], quantization=GossamerInt8Config())
done = True
thread.join()
int8 = sum(b.nbytes for m in model.modules() if isinstance(m, Int8Linear) for b in m.buffers(recurse=False))
print(json.dumps({"grown": peak - before, "int8": int8, "rest": sum(p.nbytes for p in model.parameters())}))
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))


def int8_layers(model: Any) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.fixture(scope="module")
def large(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 million parameters in bf16, in several shards."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    directory = tmp_path_factory.mktemp("large")
    return make_tiny_llama(directory, max_shard_size="80MB", dtype=torch.bfloat16, **sizes)


def test_streamed_equals_quantized_in_memory(tiny: Path):
    """Two ways to the same codes, scales and bias; the outlier store may choose differently, since one watches int8."""
    streamed, _ = load_model(tiny, quantization=GossamerInt8Config(outlier_store=0.0))
    in_memory = load_reference(tiny)
    quantize(in_memory, outlier_store=0.0)
    expected = int8_layers(in_memory)
    assert expected.keys() == int8_layers(streamed).keys()
    for name, layer in int8_layers(streamed).items():
        assert torch.equal(layer.weight, expected[name].weight)
        assert torch.equal(layer.scale, expected[name].scale)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gemma3", "opt"])
def test_round_trip_through_a_checkpoint(name: str, tmp_path: Path):
    """Sharded, transposed (GPT-2), fused (Phi-3), packed (Mixtral) and tied (Gemma) weights."""
    original = make_model(name)
    original.save_pretrained(tmp_path / "original", max_shard_size="100KB")
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=GossamerInt8Config(), **options
    )
    report = model.hf_quantizer.report
    assert {layer.name for layer in report.layers} == int8_layers(model).keys() != set()
    tokens = torch.randint(3, 199, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, exact = model(tokens).logits, original(tokens).logits
        assert (logits - exact).norm() < 0.25 * exact.norm()  # an expert more or less changes a token
        model.save_pretrained(tmp_path / "int8", max_shard_size="50KB")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", **options)
        assert torch.equal(again(tokens).logits, logits)
    separate_experts(original)
    for path, layer in int8_layers(again).items():
        source = original.get_submodule(path).weight
        source = source.t() if source.shape != layer.weight.shape or "c_" in path else source
        assert layer.outlier_columns is not None
        assert torch.equal(layer.outlier_weight, source[:, layer.outlier_columns].half())


def test_tied_store_survives_a_round_trip(tmp_path: Path):
    original = make_model("gemma3")  # tied by its configuration
    original.save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=GossamerInt8Config(skip=()), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "int8")
    names = load_file(tmp_path / "int8" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("lm_head")]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    tokens = torch.randint(3, 199, (1, 20))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_unquantized_parts_take_the_type_asked_for_and_codes_do_not_change(tiny: Path):
    plain, _ = load_model(tiny, quantization=GossamerInt8Config())
    half, _ = load_model(tiny, dtype="bfloat16", quantization=GossamerInt8Config())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, layer in int8_layers(half).items():
        other = int8_layers(plain)[name]
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.scale, other.scale)


def test_exact_columns_stay_exact_in_a_model_of_another_type(tiny: Path, tmp_path: Path):
    """The store of an fp32 model is fp16, more precise than the bf16 the rest is asked to be."""
    settings = GossamerInt8Config(outlier_store=0.1)
    model, tokenizer = load_model(tiny, dtype="bfloat16", quantization=settings)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, layer in int8_layers(again).items():
        original = int8_layers(model)[name]
        for buffer in ("weight", "scale", "outlier_columns", "outlier_weight"):
            assert torch.equal(getattr(layer, buffer), getattr(original, buffer))
            assert getattr(layer, buffer).dtype == getattr(original, buffer).dtype


def test_llm_serves_int8_with_and_without_sharing(tiny: Path):
    """Per-token outliers: what a request gets depends neither on the batch nor on sharing."""
    prompts = ["a common beginning, and " + ending for ending in ("one", "two", "three")]
    params = SamplingParams(temperature=0, max_tokens=8)
    answers = []
    for sharing in ("attention", "off"):
        # in fp32: the native runner keeps keys and values in bf16 here, and sharing changes how they are rounded
        options: dict[str, Any] = {"sharing": sharing, "runner": "transformers"}
        with LLM(tiny, quantization="int8", int8_threshold=6.0, **options) as llm:
            assert llm.quantization_report is not None and len(llm.quantization_report.layers) == 14
            answers.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
            answers.append([llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts])
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_settings_can_be_changed_when_an_int8_checkpoint_is_loaded(tiny: Path, tmp_path: Path):
    model, tokenizer = load_model(tiny, quantization=GossamerInt8Config())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for settings in (GossamerInt8Config(3.0, "absolute", "batch"), GossamerInt8Config(4.0, "relative", None)):
        loaded, _ = load_model(tmp_path, quantization=settings)
        assert {layer.decomposition for layer in int8_layers(loaded).values()} == {settings.decomposition()}
    loaded, _ = load_model(tmp_path)
    assert {layer.decomposition for layer in int8_layers(loaded).values()} == {GossamerInt8Config().decomposition()}


class TestForeign:
    """Checkpoints of bitsandbytes and compressed-tensors, which `make test-peers` compares with those projects' own."""

    @pytest.fixture(params=["bitsandbytes", "compressed-tensors"])
    def foreign(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        source = save_model("llama", tmp_path / "source")
        compress_int8(source, tmp_path / "int8", GossamerInt8Config(skip=("down_proj", "lm_head")), dtype="bfloat16")
        export(tmp_path / "int8", tmp_path / "foreign", request.param)
        return tmp_path / "foreign"

    def test_same_codes_scales_and_skipped_layers(self, foreign: Path):
        model, own = load_model(foreign)[0], load_model(foreign.parent / "int8")[0]
        layers, expected = int8_layers(model), int8_layers(own)
        assert layers.keys() == expected.keys() != set()
        assert not [name for name in layers if "down_proj" in name]
        assert model.dtype == torch.bfloat16
        bitsandbytes = "bitsandbytes" in (foreign / "config.json").read_text()
        settings = Decomposition(6.0, "absolute", "batch" if bitsandbytes else None)
        for name, layer in layers.items():
            assert torch.equal(layer.weight, expected[name].weight)
            assert torch.allclose(layer.scale, expected[name].scale, rtol=1e-6, atol=0)
            assert layer.decomposition == settings and layer.outlier_columns is None
            weight = own.get_submodule(name.rpartition(".")[0] + ".down_proj").weight if "mlp" in name else None
            if weight is not None:
                assert torch.equal(model.get_submodule(name.rpartition(".")[0] + ".down_proj").weight, weight)

    def test_served_and_given_other_settings(self, foreign: Path):
        with LLM(foreign) as llm:
            assert len(llm.generate("some text", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
        with LLM(foreign, quantization="int8", int8_threshold=4.0, runner="transformers") as llm:
            layers = int8_layers(llm.engine.runner.model).values()  # type: ignore[attr-defined]
            assert {layer.decomposition for layer in layers} == {Decomposition(4.0, "relative", "token")}

    def test_codes_of_minus_128_are_read_and_multiplied_exactly(self, foreign: Path):
        file = foreign / "model.safetensors"
        state = load_file(file)
        name = "model.layers.0.mlp.up_proj"
        state[f"{name}.weight"][0] = -128
        save_file(state, file, {"format": "pt"})
        layer = int8_layers(load_model(foreign)[0])[name]
        assert bool((layer.weight[0] == -128).all())
        x = torch.randn(2, layer.in_features)
        torch.testing.assert_close(layer(x)[:, 0], -128 * layer.scale[0] * x.sum(1), rtol=0.05, atol=0.05)

    def test_wrong_shape_and_missing_scale(self, foreign: Path):
        file = foreign / "model.safetensors"
        state = load_file(file)
        scale = next(name for name in state if name.endswith(("up_proj.SCB", "up_proj.weight_scale")))
        for change in ({scale: state[scale][:-1].clone()}, {scale: -state[scale]}, {scale: None}):
            changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
            save_file(changed, file, {"format": "pt"})
            with pytest.raises(CheckpointError, match=scale.replace(".", r"\.")):
                load_model(foreign)

    def test_cannot_be_compressed_again(self, foreign: Path, tmp_path: Path):
        with pytest.raises(ConfigurationError, match="quantized already"):
            compress_int8(foreign, tmp_path / "again", GossamerInt8Config())


class TestGGUF:
    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("llama", {"tie_word_embeddings": False}),
            ("qwen2", {}),
            ("gemma3", {}),
            ("llama", {"num_key_value_heads": 1}),
        ],
    )
    def test_read_as_int8_without_being_converted(self, name: str, changes: dict[str, Any], tmp_path: Path):
        """Permuted rows (Llama), biases (Qwen 2), norms less one (Gemma), and an output layer that is skipped."""
        compress_int8(save_model(name, tmp_path / "source", **changes), tmp_path / "int8", GossamerInt8Config())
        export(tmp_path / "int8", tmp_path / "model.gguf", "gguf")
        settings = GossamerInt8Config(outlier_store=0.05)
        streamed, _ = load_model(tmp_path / "model.gguf", quantization=settings)
        converted, _ = load_model(import_gguf(tmp_path / "model.gguf").path, quantization=settings)
        layers, expected = int8_layers(streamed), int8_layers(converted)
        assert layers.keys() == expected.keys() != set()
        for path, layer in layers.items():
            for buffer in ("weight", "scale", "outlier_columns", "outlier_weight"):
                assert torch.equal(getattr(layer, buffer), getattr(expected[path], buffer))
        tokens = torch.randint(3, 199, (1, 12))
        with torch.no_grad():
            torch.testing.assert_close(streamed(tokens).logits, converted(tokens).logits)

    def test_damaged(self, tmp_path: Path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            LLM(tmp_path / "model.gguf", quantization="int8")


class TestCompress:
    def test_result_is_a_checkpoint_that_loads_alike(self, tmp_path: Path):
        source = save_model("qwen3", tmp_path / "source")
        report = compress_int8(source, tmp_path / "int8", GossamerInt8Config())
        assert verify(tmp_path / "int8", full=True) == []
        recipe = json.loads((tmp_path / "int8" / "gossamer.json").read_text())["source"]
        assert recipe["int8"]["criterion"] == "relative" and recipe["skipped"] == {"lm_head": "named in skip"}
        direct, _ = load_model(source, quantization=GossamerInt8Config())
        again, _ = load_model(tmp_path / "int8")
        tokens = torch.randint(3, 199, (1, 12))
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, direct(tokens).logits)
        assert len(report.quantization.layers) == len(int8_layers(again))
        assert report.bytes < report.source_bytes

    def test_command(self, tmp_path: Path):
        source = save_model("llama", tmp_path / "source")
        arguments = ["compress", str(source), "-o", str(tmp_path / "out"), "--int8", "--skip", "down_proj", "--json"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert {name.rsplit(".", 1)[-1] for name in report["quantization"]["skipped"]} == {"down_proj"}
        with pytest.raises(ConfigurationError, match="--overwrite"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
        with pytest.raises(ConfigurationError, match="say how"):
            CliRunner().invoke(app, arguments[:4], catch_exceptions=False)

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("when", ["reading", "writing"])
    def test_interrupted(self, tmp_path: Path, when: str):
        """Ctrl-C, for real, while weights are quantized or written: nothing is left."""
        source = save_model("llama", tmp_path / "source")
        script = f"""
import os, signal, sys
from gossamer import GossamerInt8Config
from gossamer.compress.int8 import compress_int8
stop = lambda *_: os.kill(os.getpid(), signal.SIGINT)
compress_int8(sys.argv[1], sys.argv[2], GossamerInt8Config(), {"on_layer" if when == "reading" else "on_bytes"}=stop)
"""
        done = run_program(script, source, tmp_path / "out")
        assert "KeyboardInterrupt" in done.stderr and done.returncode != 0
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestMemory:
    def watch(self, small: Path, model: Path) -> dict[str, float]:
        command = [sys.executable, "-c", LOAD_AND_WATCH, str(small), str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])

    def test_safetensors(self, tiny: Path, large: Path):
        assert len(list(large.glob("*.safetensors"))) >= 3
        memory = self.watch(tiny, large)
        assert memory["int8"] > 90e6
        assert memory["grown"] <= memory["int8"] + memory["rest"] + MEMORY_SLACK

    def test_gguf(self, tmp_path: Path):
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
        for name, changes in (("small", {}), ("large", sizes)):
            compress_int8(save_model("llama", tmp_path / name, **changes), tmp_path / f"{name}-8", GossamerInt8Config())
            export(tmp_path / f"{name}-8", tmp_path / f"{name}.gguf", "gguf")
        memory = self.watch(tmp_path / "small.gguf", tmp_path / "large.gguf")
        assert memory["int8"] > 60e6  # and 240 MB in fp32
        assert memory["grown"] <= memory["int8"] + memory["rest"] + MEMORY_SLACK


class TestBadInput:
    def test_settings(self, tiny: Path):
        for arguments in (
            {"quantization": "int4"},
            {"quantization": "int8", "int8_threshold": 0.0},
            {"quantization": "int8", "int8_criterion": "some"},
            {"quantization": "int8", "int8_outliers": "none of them"},
        ):
            with pytest.raises(ConfigurationError):
                LLM(tiny, **arguments)  # type: ignore[arg-type]

    def test_weight_that_is_not_finite_is_named(self, tiny: Path, tmp_path: Path):
        change_weight(tiny, tmp_path, lambda weight: weight.index_fill(0, torch.tensor([1]), float("nan")))
        with pytest.raises(
            ConfigurationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has an entry that is NaN"
        ):
            load_model(tmp_path, quantization=GossamerInt8Config())

    def test_weights_of_another_type_are_converted_before(self, tiny: Path, tmp_path: Path):
        change_weight(tiny, tmp_path, lambda weight: weight.double())
        model, expected = (load_model(path, quantization=GossamerInt8Config())[0] for path in (tmp_path, tiny))
        for name, layer in int8_layers(model).items():
            assert torch.equal(layer.weight, int8_layers(expected)[name].weight)

    def test_truncated_safetensors(self, tiny: Path, tmp_path: Path):
        change_weight(tiny, tmp_path, lambda weight: weight)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="damaged or cut off"):
            load_model(tmp_path, quantization=GossamerInt8Config())

    def test_int8_checkpoint_without_its_scales(self, tiny: Path, tmp_path: Path):
        model, tokenizer = load_model(tiny, quantization=GossamerInt8Config())
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        scale = state.pop("model.layers.0.mlp.up_proj.scale")
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"among them model\.layers\.0\.mlp\.up_proj\.scale"):
            load_model(tmp_path)
        save_file(state | {"model.layers.0.mlp.up_proj.scale": scale[:5]}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError):
            load_model(tmp_path)


def change_weight(source: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A copy of a checkpoint with one weight changed."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: change(state[name])}, target / "model.safetensors", {"format": "pt"})
