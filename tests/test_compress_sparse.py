"""compress --sparsity: what it writes, what reads it, and what an interruption leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from forked import run_program
from gossamer import LLM, GossamerInt8Config, SamplingParams
from gossamer.cli.app import app
from gossamer.compress.export import export
from gossamer.compress.sparse import CURVATURES, SparsityRecipe, compress_sparse
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models.manifest import verify
from gossamer.pruning import load_masks
from gossamer.texts import reference_text
from native_checkpoints import save_model

FAST = {"sequences": 4, "length": 16, "reconstruction": 1}
TEXT = reference_text()[:20_000]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("sparse") / "source")


def pruned_weights(directory: Path) -> dict[str, torch.Tensor]:
    weights = load_file(directory / "model.safetensors")
    return {name: weight for name, weight in weights.items() if name.endswith("proj.weight")}


class TestDense:
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block4"])
    @pytest.mark.parametrize("curvature", list(CURVATURES))
    def test_half_of_each_model_is_zero(self, source: Path, tmp_path: Path, curvature: str, pattern: str) -> None:
        recipe = SparsityRecipe(0.5, pattern, curvature, **FAST)
        report = compress_sparse(source, tmp_path / "out", recipe, TEXT)
        weights, masks = pruned_weights(tmp_path / "out"), load_masks(tmp_path / "out" / "masks.safetensors")
        assert set(weights) == set(masks)
        assert all(torch.equal(weight != 0, masks[name]) for name, weight in weights.items())
        share = sum(int((weight == 0).sum()) for weight in weights.values()) / sum(w.numel() for w in weights.values())
        assert share == pytest.approx(0.5, abs=0.01) and report.pruning.sparsity == pytest.approx(share)
        if pattern == "2:4":
            assert all(bool(((w.reshape(-1, 4) != 0).sum(1) == 2).all()) for w in weights.values())
        assert not verify(tmp_path / "out", full=True)
        manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())["source"]
        assert manifest["sparsity"]["pattern"] == pattern and len(manifest["calibration_sha256"]) == 64
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_transformers_and_the_engine_read_it(self, source: Path, tmp_path: Path) -> None:
        compress_sparse(source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor([[5, 6, 7, 8]])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0, 4:].tolist()
        llm = LLM(str(tmp_path / "out"))
        settings = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        output = llm.generate([{"prompt_token_ids": ids[0].tolist()}], settings, use_tqdm=False)[0]
        assert output.outputs[0].token_ids == wanted

    def test_the_same_command_gives_the_same_bytes(self, source: Path, tmp_path: Path) -> None:
        for name in "ab":
            compress_sparse(source, tmp_path / name, SparsityRecipe(0.5, **FAST), TEXT)
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
        assert first == second

    def test_dtype_is_of_what_is_written(self, source: Path, tmp_path: Path) -> None:
        compress_sparse(source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT, dtype="bfloat16")
        assert {weight.dtype for weight in pruned_weights(tmp_path / "out").values()} == {torch.bfloat16}


class TestInt8:
    def test_int8_with_zeros_loads_and_exports(self, source: Path, tmp_path: Path) -> None:
        report = compress_sparse(
            source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT, int8=GossamerInt8Config(), dtype="bfloat16"
        )
        assert report.quantization is not None and not (tmp_path / "out" / "masks.safetensors").exists()
        llm = LLM(str(tmp_path / "out"))
        output = llm.generate(["The harbour"], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) > 0
        for format, name in (("bitsandbytes", "b"), ("compressed-tensors", "c"), ("gguf", "g.gguf")):
            export(tmp_path / "out", tmp_path / name, format)
        codes = load_file(tmp_path / "b" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert codes.dtype == torch.int8 and float((codes == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


class TestInterrupted:
    def test_a_pruned_mixture_in_int8_loads(self, tmp_path: Path) -> None:
        mixture = save_model("mixtral", tmp_path / "mixture")
        recipe = SparsityRecipe(0.5, **FAST)
        report = compress_sparse(mixture, tmp_path / "out", recipe, TEXT, int8=GossamerInt8Config())
        assert report.quantization is not None
        assert any(".experts.1.up_proj" in layer.name for layer in report.quantization.layers)
        settings = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        answers = []
        for runner in ("native", "transformers"):
            with LLM(str(tmp_path / "out"), runner=runner, dtype="float32") as llm:
                output = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], settings, use_tqdm=False)[0]
                answers.append(output.outputs[0].token_ids)
        assert answers[0] == answers[1]

    def test_it_goes_on_where_it_was_killed(self, source: Path, tmp_path: Path) -> None:
        """Killed for real after the first block; what comes out is what comes out without that."""
        script = """
import os, signal, sys
from gossamer.texts import reference_text
from gossamer.compress.sparse import SparsityRecipe, compress_sparse
def stop(phase, done, total):
    if phase == "blocks":
        os.kill(os.getpid(), signal.SIGKILL)
recipe = SparsityRecipe(0.5, sequences=4, length=16, reconstruction=1)
compress_sparse(sys.argv[1], sys.argv[2], recipe, reference_text()[:20_000], on_progress=stop)
"""
        done = run_program(script, source, tmp_path / "out")
        assert done.returncode == -9, done.stderr
        left = [path.name for path in tmp_path.iterdir()]
        assert len(left) == 1 and left[0].startswith(".out.unfinished-")
        recipe = SparsityRecipe(0.5, **FAST)
        other = compress_sparse(source, tmp_path / "other", recipe, TEXT)
        resumed = compress_sparse(source, tmp_path / "out", recipe, TEXT)
        assert resumed.resumed == 1 and other.resumed == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other"))
        assert first == second
        assert resumed.pruning.predicted_loss == pytest.approx(other.pruning.predicted_loss)
        assert resumed.pruning.reconstruction == other.pruning.reconstruction

    @pytest.mark.parametrize("curvature", ["gram", "block-fisher"])
    def test_ctrl_c_leaves_no_output(self, source: Path, tmp_path: Path, curvature: str) -> None:
        def stop(phase: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress_sparse(
                source, tmp_path / "out", SparsityRecipe(0.5, curvature=curvature, **FAST), TEXT, on_progress=stop
            )
        assert not (tmp_path / "out").exists()

    def test_other_settings_do_not_go_on(self, source: Path, tmp_path: Path) -> None:
        def stop(phase: str, done: int, total: int) -> None:
            if phase == "blocks":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress_sparse(source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT, on_progress=stop)
        report = compress_sparse(source, tmp_path / "out", SparsityRecipe(0.4, **FAST), TEXT)
        assert report.resumed == 0 and report.pruning.sparsity == pytest.approx(0.4, abs=0.01)

    def test_other_weights_under_the_same_name_do_not_go_on(self, source: Path, tmp_path: Path) -> None:
        def stop(phase: str, done: int, total: int) -> None:
            if phase == "blocks":
                raise KeyboardInterrupt

        other = save_model("llama", tmp_path / "source")
        with pytest.raises(KeyboardInterrupt):
            compress_sparse(other, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT, on_progress=stop)
        weights = load_file(other / "model.safetensors")
        save_file({name: -weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
        assert compress_sparse(other, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT).resumed == 0

    def test_a_damaged_part_is_done_again(self, source: Path, tmp_path: Path) -> None:
        def stop(phase: str, done: int, total: int) -> None:
            if phase == "blocks":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress_sparse(source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT, on_progress=stop)
        part = next(tmp_path.glob(".out.unfinished-*/block-000-0.5.safetensors"))
        part.write_bytes(part.read_bytes()[:100])
        compress_sparse(source, tmp_path / "out", SparsityRecipe(0.5, **FAST), TEXT)
        compress_sparse(source, tmp_path / "other", SparsityRecipe(0.5, **FAST), TEXT)
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other"))
        assert first == second


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sparsity": 1.0}, "between 0 and 1"),
            ({"sparsity": 0.0}, "between 0 and 1"),
            ({"sparsity": 0.6, "pattern": "2:4"}, "makes a share of 0.5"),
            ({"sparsity": 0.5, "pattern": "random"}, "a pattern is"),
            ({"sparsity": 0.5, "curvature": "hessian"}, "curvature is one of"),
            ({"sparsity": 0.5, "sequences": 0}, "at least one sequence"),
            ({"sparsity": 0.5, "reconstruction": -1}, "counts times"),
        ],
    )
    def test_recipes_without_a_meaning(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            SparsityRecipe(**changes)  # type: ignore[arg-type]  # wrong on purpose

    def test_what_cannot_be_done_says_so_in_numbers(self, source: Path, tmp_path: Path) -> None:
        recipe = SparsityRecipe(0.5, **FAST)
        with pytest.raises(ConfigurationError, match=r"holds \d+ sequences of 16 tokens, and 4 are needed"):
            compress_sparse(source, tmp_path / "out", recipe, TEXT[:60])
        with pytest.raises(ConfigurationError, match=r"GB of memory do not suffice: the model takes"):
            compress_sparse(source, tmp_path / "out", recipe, TEXT, memory=1000)
        odd = save_model("llama", tmp_path / "odd", intermediate_size=66)
        with pytest.raises(ConfigurationError, match=r"rows of .*down_proj.weight have 66 weights"):
            compress_sparse(odd, tmp_path / "out", SparsityRecipe(0.5, "2:4", **FAST), TEXT)
        with pytest.raises(GossamerError, match="must not lie in one another"):
            compress_sparse(source, source / "out", recipe, TEXT)
        with pytest.raises(ConfigurationError, match="dtype is 'bf16'"):
            compress_sparse(source, tmp_path / "out", recipe, TEXT, dtype="bf16")
        compress_sparse(source, tmp_path / "out", recipe, TEXT, int8=GossamerInt8Config())
        with pytest.raises(ConfigurationError, match="quantized already"):
            compress_sparse(tmp_path / "out", tmp_path / "again", recipe, TEXT)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "out"]


class TestCommand:
    def test_json(self, source: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text(TEXT)
        arguments = ["compress", str(source), "-o", str(tmp_path / "out"), "--sparsity", "0.5", "--text", str(text)]
        arguments += ["--sequences", "4", "--length", "16", "--reconstruction", "1", "--memory", "2GB", "--json"]
        done = CliRunner().invoke(app, [*arguments, "--int8"], catch_exceptions=False)
        report = json.loads(done.stdout)
        assert report["pruning"]["sparsity"] == pytest.approx(0.5, abs=0.01) and report["quantization"]["layers"]

    def test_a_skipped_block_stays_dense(self, source: Path, tmp_path: Path) -> None:
        recipe = SparsityRecipe(0.5, **FAST, skip=("lm_head", "model.layers.0"))
        compress_sparse(source, tmp_path / "out", recipe, TEXT)
        shares = {name: float((w == 0).float().mean()) for name, w in pruned_weights(tmp_path / "out").items()}
        assert all(share < 0.01 for name, share in shares.items() if ".0." in name)
        assert all(share == pytest.approx(0.5, abs=0.01) for name, share in shares.items() if ".1." in name)

    def test_options_of_pruning_alone_are_refused(self, source: Path, tmp_path: Path) -> None:
        arguments = ["compress", str(source), "-o", str(tmp_path / "out"), "--int8", "--pattern", "2:4"]
        with pytest.raises(ConfigurationError, match="are for pruning"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)

    def test_nothing_to_do_is_said(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"--sparsity 0.5 makes half"):
            CliRunner().invoke(app, ["compress", str(source), "-o", str(tmp_path / "out")], catch_exceptions=False)
