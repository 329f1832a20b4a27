"""compress --int4: what it writes, what reads it, and what an interruption leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from forked import run_program
from gossamer import LLM, GossamerInt8Config, SamplingParams
from gossamer.cli.app import app
from gossamer.compress.export import export
from gossamer.compress.int4 import Int4Recipe, compress_int4
from gossamer.compress.int8 import compress_int8
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.models.load import load_model
from gossamer.models.manifest import verify
from gossamer.texts import reference_text, token_windows
from native_checkpoints import save_model

FAST = {"sequences": 8, "length": 32}
TEXT = reference_text()[:20_000]
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("int4") / "source", **WIDE)


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def distance(path: Path, source: Path) -> float:
    """Mean squared error of the logits on text that was not calibrated on."""
    original, tokenizer = load_model(source, "float32")
    model, _ = load_model(path, "float32")
    ids = torch.stack(token_windows(tokenizer, reference_text()[50_000:60_000], 64, 16))
    with torch.inference_mode():
        return float((model(ids).logits - original(ids).logits).square().mean())


class TestGGUF:
    def test_layers_are_rounded_and_the_rest_is_there(self, source: Path, tmp_path: Path) -> None:
        report = compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT)
        found = types(report.path)
        assert found["token_embd.weight"] == "Q6_K" and found["blk.0.attn_q.weight"] == "Q4_K"
        assert found["blk.1.ffn_down.weight"] == "Q6_K" and found["output_norm.weight"] == "F32"
        assert len(report.layers) == 14 and all(0 < layer.error < 0.2 for layer in report.layers)
        assert report.bytes == report.path.stat().st_size < report.source_bytes / 4
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
        recipe = json.loads(GGUFReader(report.path).fields["gossamer.json"].contents())["source"]
        assert recipe["int4"]["type"] == "q4_k_m" and len(recipe["calibration_sha256"]) == 64
        assert "14 weights rounded: 12 Q4_K, 2 Q6_K" in str(report)

    @pytest.mark.parametrize(("name", "kind"), [("llama", "q4_0"), ("qwen2", "q4_k_m"), ("gemma3", "q4_k_m")])
    def test_it_is_closer_to_the_original_than_rounding_alone(self, name: str, kind: str, tmp_path: Path) -> None:
        changes = {"num_hidden_layers": 6} if name == "gemma3" else {}  # its layers take turns
        source = save_model(name, tmp_path / "source", **WIDE, **changes)
        recipe = Int4Recipe(kind, sequences=16, length=64)
        second = compress_int4(source, tmp_path / "second.gguf", recipe, reference_text()[:50_000]).path
        nearest = export(source, tmp_path / "nearest.gguf", "gguf", type=kind).path
        assert types(second) == types(nearest) and abs(second.stat().st_size - nearest.stat().st_size) < 8000
        assert distance(second, source) < 0.9 * distance(nearest, source)

    def test_rows_that_256_does_not_divide_take_wider_types(self, tmp_path: Path) -> None:
        source = save_model("llama", tmp_path / "source", intermediate_size=72)
        found = types(compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT).path)
        assert found["blk.0.attn_q.weight"] == "Q5_0" and found["blk.1.attn_v.weight"] == "Q8_0"
        assert found["blk.0.ffn_down.weight"] == "F16" and found["token_embd.weight"] == "Q8_0"

    def test_the_engine_says_what_the_rounded_weights_say(self, source: Path, tmp_path: Path) -> None:
        file = compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT).path
        model, _ = load_model(file, "float32")
        ids = torch.tensor([[5, 6, 7, 8]])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0, 4:].tolist()
        settings = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        llm = LLM(str(file), dtype="float32")
        output = llm.generate([{"prompt_token_ids": ids[0].tolist()}], settings, use_tqdm=False)[0]
        assert output.outputs[0].token_ids == wanted

    def test_the_same_command_gives_the_same_bytes(self, source: Path, tmp_path: Path) -> None:
        first, second = (
            compress_int4(source, tmp_path / f"{name}.gguf", Int4Recipe(**FAST), TEXT).path for name in "ab"
        )
        assert first.read_bytes() == second.read_bytes()


class TestPackQuantized:
    def test_the_tensors_mean_the_rounded_weights(self, source: Path, tmp_path: Path) -> None:
        report = compress_int4(source, tmp_path / "out", Int4Recipe("w4a16", **FAST), TEXT)
        stored = load_file(report.path / "model.safetensors")
        original = load_file(source / "model.safetensors")
        config = json.loads((report.path / "config.json").read_text())["quantization_config"]
        assert config["format"] == "pack-quantized"
        assert config["config_groups"]["group_0"]["weights"]["group_size"] == 128
        assert config["ignore"] == ["lm_head"] and not verify(report.path, full=True)
        assert json.loads((report.path / "gossamer.json").read_text())["source"]["int4"]["type"] == "w4a16"
        name = "model.layers.0.mlp.down_proj"
        words, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
        assert stored[f"{name}.weight_shape"].tolist() == [256, 512] and scale.dtype == torch.bfloat16
        codes = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)
        values = codes * scale.float().repeat_interleave(128, 1)
        error = (values - original[f"{name}.weight"]).norm() / original[f"{name}.weight"].norm()
        assert error < 0.2 and f"{name}.weight" not in stored
        assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16

    def test_groups_are_as_wide_as_all_rows_allow(self, tmp_path: Path) -> None:
        source = save_model("llama", tmp_path / "source")  # rows of 64 and 96
        report = compress_int4(source, tmp_path / "out", Int4Recipe("w4a16", **FAST), TEXT, dtype="float16")
        config = json.loads((report.path / "config.json").read_text())["quantization_config"]
        assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
        stored = load_file(report.path / "model.safetensors")
        assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 3)
        assert stored["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float16

    def test_what_is_skipped_stays_and_is_ignored(self, source: Path, tmp_path: Path) -> None:
        recipe = Int4Recipe("w4a16", skip=("lm_head", "mlp.down_proj"), **FAST)
        report = compress_int4(source, tmp_path / "out", recipe, TEXT)
        config = json.loads((report.path / "config.json").read_text())["quantization_config"]
        assert "model.layers.1.mlp.down_proj" in config["ignore"] and len(report.layers) == 12
        assert "model.layers.1.mlp.down_proj.weight" in load_file(report.path / "model.safetensors")


class TestInterruptions:
    def test_it_goes_on_where_it_was_killed(self, source: Path, tmp_path: Path) -> None:
        script = """
import os, signal, sys
from gossamer.texts import reference_text
from gossamer.compress.int4 import Int4Recipe, compress_int4
def stop(phase, done, total):
    os.kill(os.getpid(), signal.SIGKILL)
recipe = Int4Recipe("w4a16", sequences=8, length=32)
compress_int4(sys.argv[1], sys.argv[2], recipe, reference_text()[:20_000], on_progress=stop)
"""
        done = run_program(script, source, tmp_path / "out")
        assert done.returncode == -signal.SIGKILL, done.stderr
        left = [path.name for path in tmp_path.iterdir()]
        assert len(left) == 1 and left[0].startswith(".out.unfinished-")
        recipe = Int4Recipe("w4a16", **FAST)
        resumed = compress_int4(source, tmp_path / "out", recipe, TEXT)
        other = compress_int4(source, tmp_path / "other", recipe, TEXT)
        assert (resumed.resumed, other.resumed) == (1, 0) and resumed.layers == other.layers
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other"))
        assert first == second

    def test_ctrl_c_leaves_no_output_and_other_settings_do_not_go_on(self, source: Path, tmp_path: Path) -> None:
        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        for at in ({"on_progress": stop}, {"on_bytes": stop}):
            with pytest.raises(KeyboardInterrupt):
                compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT, **at)
            assert not (tmp_path / "out.gguf").exists()
        report = compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST, relative_damping=0.1), TEXT)
        assert report.resumed == 0

    def test_what_was_there_stays_until_it_is_replaced(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out.gguf").write_bytes(b"mine")
        with pytest.raises(ConfigurationError, match="--overwrite"):
            compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT)
        assert (tmp_path / "out.gguf").read_bytes() == b"mine"
        compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT, overwrite=True)
        assert types(tmp_path / "out.gguf")


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"type": "q3_k"}, "one of q4_k_m, q4_0, w4a16"),
            ({"sequences": 0}, "at least one sequence"),
            ({"skip": ("lm_head",)}, "nothing can be skipped with q4_k_m"),
            ({"relative_damping": 0.0}, "damping is above 0"),
        ],
    )
    def test_recipes_without_a_meaning(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            Int4Recipe(**changes)

    def test_what_is_quantized_already_is_refused_by_name(self, source: Path, tmp_path: Path) -> None:
        recipe = Int4Recipe(**FAST)
        file = compress_int4(source, tmp_path / "four.gguf", recipe, TEXT).path
        with pytest.raises(
            ConfigurationError,
            match=r"four\.gguf is quantized already: blk\.0\.attn_q\.weight, at byte \d+ of the file, is Q4_K",
        ):
            compress_int4(file, tmp_path / "again.gguf", recipe, TEXT)
        compress_int4(source, tmp_path / "packed", Int4Recipe("w4a16", **FAST), TEXT)
        with pytest.raises(ConfigurationError, match=r"quantized already .compressed-tensors"):
            compress_int4(tmp_path / "packed", tmp_path / "again.gguf", recipe, TEXT)
        with pytest.raises(ConfigurationError, match=r"quantized already .compressed-tensors"):
            export(tmp_path / "packed", tmp_path / "again.gguf", "gguf", type="q4_k_m")
        compress_int8(source, tmp_path / "int8", GossamerInt8Config())
        with pytest.raises(ConfigurationError, match=r"quantized already .gossamer"):
            compress_int4(tmp_path / "int8", tmp_path / "again.gguf", recipe, TEXT)

    def test_an_eight_bit_file_may_be_rounded(self, source: Path, tmp_path: Path) -> None:
        eight = export(source, tmp_path / "eight.gguf", "gguf", type="q8_0").path
        compress_int4(eight, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT)
        assert types(tmp_path / "out.gguf")["blk.0.attn_q.weight"] == "Q4_K"

    @pytest.mark.parametrize("wrong", [float("nan"), 1e30])
    def test_weights_that_no_block_holds(self, source: Path, tmp_path: Path, wrong: float) -> None:
        broken = save_model("llama", tmp_path / "broken", **WIDE)
        weights = load_file(broken / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = wrong
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds .* at \[3, 4\]"):
            compress_int4(broken, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds .* at \[3, 4\]"):
            export(broken, tmp_path / "out.gguf", "gguf", type="q4_k_m")
        assert not (tmp_path / "out.gguf").exists()

    def test_models_that_the_format_cannot_say(self, tmp_path: Path) -> None:
        gpt2 = save_model("gpt2", tmp_path / "gpt2")
        with pytest.raises(UnsupportedModelError, match="gpt2 cannot be exported to GGUF"):
            compress_int4(gpt2, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT)
        with pytest.raises(UnsupportedModelError, match=r"not of an nn\.Linear"):
            compress_int4(gpt2, tmp_path / "out", Int4Recipe("w4a16", **FAST), TEXT)
        odd = save_model("llama", tmp_path / "odd", intermediate_size=72)
        with pytest.raises(UnsupportedModelError, match=r"down_proj\.weight has rows of 72"):
            compress_int4(odd, tmp_path / "out", Int4Recipe("w4a16", **FAST), TEXT)

    def test_outputs_and_texts_that_do_not_do(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"has to end in \.gguf"):
            compress_int4(source, tmp_path / "out", Int4Recipe(**FAST), TEXT)
        with pytest.raises(ConfigurationError, match=r"must not end in \.gguf"):
            compress_int4(source, tmp_path / "out.gguf", Int4Recipe("w4a16", **FAST), TEXT)
        with pytest.raises(ConfigurationError, match=r"holds \d+ sequences of 32 tokens, and 8 are needed"):
            compress_int4(source, tmp_path / "out.gguf", Int4Recipe(**FAST), TEXT[:200])
        with pytest.raises(GossamerError, match="must not lie in one another"):
            compress_int4(source, source / "out.gguf", Int4Recipe(**FAST), TEXT)
        for dtype, message in (("bf16", "dtype is 'bf16'"), ("float32", "bfloat16 or float16")):
            with pytest.raises(ConfigurationError, match=message):
                compress_int4(source, tmp_path / "out", Int4Recipe("w4a16", **FAST), TEXT, dtype=dtype)


class TestCommand:
    def test_the_output_says_the_format(self, source: Path, tmp_path: Path) -> None:
        for name, kind in (("out.gguf", "q4_k_m"), ("out", "w4a16")):
            options = ["--int4", "--sequences", "8", "--length", "32", "--json"]
            done = CliRunner().invoke(app, ["compress", str(source), "-o", str(tmp_path / name), *options])
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)["type"] == kind

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--int4", "--int8"], "--int4 goes alone"),
            (["--type", "q4_0", "--int8"], "--type is of 4-bit weights"),
            (["--int4", "--memory", "1GB", "--pattern", "2:4"], "are for pruning: --pattern, --memory"),
            (["--int4", "--skip", "lm_head"], "nothing can be skipped"),
            (["--int4", "--dtype", "float16"], "in a GGUF file is float32"),
            ([], "say how to compress"),
        ],
    )
    def test_options_that_contradict(self, source: Path, tmp_path: Path, options: list[str], message: str) -> None:
        done = CliRunner().invoke(app, ["compress", str(source), "-o", str(tmp_path / "out.gguf"), *options])
        assert done.exit_code != 0 and message in str(done.exception)


class TestExport:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_checkpoint_in_floating_point_becomes_a_file(self, source: Path, tmp_path: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        stored = tmp_path / "stored"
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(stored)
        AutoTokenizer.from_pretrained(source).save_pretrained(stored)
        for kind in ("f32", "q8_0", "q4_0", "q4_k_m"):
            file = export(stored, tmp_path / f"{kind}.gguf", "gguf", type=kind).path
            tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
            weight = load_file(stored / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().numpy()
            found = dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
            bound = {"f32": 0, "q8_0": 0.01, "q4_0": 0.12, "q4_k_m": 0.1}[kind]
            assert np.linalg.norm(found - weight) <= bound * np.linalg.norm(weight)

    def test_int8_checkpoints_too(self, source: Path, tmp_path: Path) -> None:
        compress_int8(source, tmp_path / "int8", GossamerInt8Config())
        report = export(tmp_path / "int8", tmp_path / "out.gguf", "gguf", type="q4_k_m")
        assert types(report.path)["blk.0.attn_q.weight"] == GGMLQuantizationType.Q4_K.name
        assert any("decomposition" in warning for warning in report.warnings)

    def test_types_are_of_gguf_files(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="only GGUF files are of several types"):
            export(source, tmp_path / "out", "bitsandbytes", type="q4_k_m")
        with pytest.raises(ConfigurationError, match="one of f32, q8_0, q4_k_m, q4_0"):
            export(source, tmp_path / "out.gguf", "gguf", type="q9")
