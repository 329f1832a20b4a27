"""Exports hold the same weights, appear whole or not at all, and say what is lost; foreign checkpoints are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from foreign_checkpoints import LAYER, SAFETENSORS, quantization_config, read_as_native
from gossamer.cli.app import app
from gossamer.compress import format_bitsandbytes
from gossamer.compress.export import FORMATS, export
from gossamer.compress.int8 import compress_int8
from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.skeleton import Skeleton
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    GossamerError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from gossamer.models import bitsandbytes_int8, scratch
from gossamer.models.int8_quantizer import GossamerInt8Config
from native_checkpoints import dequantized_tensors, save_model, write_native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with tied embeddings, not quantized."""
    return save_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def native(model: Path) -> Path:
    """The same in int8, without an outlier store."""
    return write_native(model, model.parent / "llama-int8")


def output_for(directory: Path, format: str) -> Path:
    return directory / ("out.gguf" if format == "gguf" else "out")


# --- what is written -------------------------------------------------------------------------------------------------


def test_bitsandbytes_tensors_are_what_the_format_says(native, tmp_path):
    export(native, tmp_path / "out", "bitsandbytes")
    ours, theirs = load_file(native / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(theirs[f"{path}.weight"], ours[f"{path}.weight"])
    assert torch.equal(theirs[f"{path}.SCB"], ours[f"{path}.scale"] * 127)
    assert (theirs[f"{path}.weight_format"].dtype, theirs[f"{path}.weight_format"].shape) == (torch.uint8, ())
    assert theirs[f"{path}.weight_format"] == 0
    assert not [name for name in theirs if name.endswith(".scale")]


def test_compressed_tensors_are_what_the_format_says(native, tmp_path):
    export(native, tmp_path / "out", "compressed-tensors")
    ours, theirs = load_file(native / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(theirs[f"{path}.weight"], ours[f"{path}.weight"])
    assert torch.equal(theirs[f"{path}.weight_scale"], ours[f"{path}.scale"][:, None])


@pytest.mark.parametrize("format", SAFETENSORS)
def test_the_directory_is_a_complete_checkpoint(format, native, tmp_path):
    (native / "gossamer.json").write_text("{}")
    export(native, tmp_path / "out", format)
    (native / "gossamer.json").unlink()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in native.iterdir()}
    for path in native.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (json.loads((directory / "config.json").read_text()) for directory in (native, tmp_path / "out"))
    assert theirs.pop("quantization_config")["quant_method"] == format
    del ours["quantization_config"]
    assert theirs == ours


@pytest.mark.parametrize("format", SAFETENSORS)
def test_every_layer_that_stays_in_floating_point_is_named(format, tmp_path):
    source = save_model("llama", tmp_path / "model", tie_word_embeddings=False)
    native = write_native(source, tmp_path / "int8", keep=("lm_head", "embed", "layers.1.mlp.up_proj", "0.self_attn"))
    export(native, tmp_path / "out", format)
    config = quantization_config(tmp_path / "out")
    named = config["llm_int8_skip_modules"] if format == "bitsandbytes" else config["ignore"]
    attention = [f"model.layers.0.self_attn.{letter}_proj" for letter in "kqvo"]
    assert sorted(named) == sorted([*attention, "model.layers.1.mlp.up_proj", "lm_head"])


@pytest.mark.parametrize("format", SAFETENSORS)
def test_int8_embeddings_are_dequantized_and_a_tied_head_is_left_out(format, model, tmp_path):
    native = write_native(model, tmp_path / "int8", keep=())
    tensors = load_file(native / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.scale"] = tensors["model.embed_tokens.scale"].clone()
    save_file(tensors, native / "model.safetensors")
    export(native, tmp_path / "out", format)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(theirs["model.embed_tokens.weight"], dequantized_tensors(native)["model.embed_tokens.weight"])
    assert not [name for name in theirs if "lm_head" in name or "embed_tokens.scale" in name]


@pytest.mark.parametrize(
    ("settings", "threshold", "outliers", "warnings"),
    [
        ({"criterion": "absolute", "outliers": "batch", "threshold": 4.5}, 4.5, "batch", 0),
        ({"criterion": "absolute", "outliers": "token", "threshold": 4.5}, 4.5, "batch", 1),
        ({"criterion": "relative", "outliers": "token", "threshold": 8.0}, 6.0, "batch", 2),
        ({"criterion": "relative", "outliers": None, "threshold": 8.0}, 0.0, None, 0),
    ],
)
def test_bitsandbytes_gets_the_threshold_it_can_express(settings, threshold, outliers, warnings, model, tmp_path):
    native = write_native(model, tmp_path / "int8", **settings)
    report = export(native, tmp_path / "out", "bitsandbytes")
    config = quantization_config(tmp_path / "out")
    assert config["llm_int8_threshold"] == threshold
    assert bitsandbytes_int8.read_config(config)["outliers"] == outliers
    assert len(report.warnings) == warnings


@pytest.mark.parametrize("format", FORMATS)
def test_a_lost_outlier_store_is_said(format, model, tmp_path):
    native = write_native(model, tmp_path / "int8", outlier_columns=3)
    report = export(native, output_for(tmp_path, format), format)
    lost = [warning for warning in report.warnings if "16-bit" in warning]
    assert len(lost) == (0 if format == "gguf" else 1)  # GGUF's weights are made from the exact columns
    assert any("no decomposition" in warning for warning in report.warnings) == (format != "bitsandbytes")


@pytest.mark.parametrize("tied", [True, False])
def test_what_compress_writes_goes_into_every_format(tied, tmp_path):
    source = save_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    native = compress_int8(source, tmp_path / "int8", GossamerInt8Config(skip=(), outlier_store=0.05)).path
    for format in FORMATS:
        report = export(native, output_for(tmp_path, format), format, overwrite=True)
        if format != "gguf":
            theirs = load_file(report.path / "model.safetensors")
            embeddings = theirs["model.embed_tokens.weight"]
            torch.testing.assert_close(embeddings, dequantized_tensors(native)["model.embed_tokens.weight"])
            assert embeddings.is_floating_point()
            assert ("lm_head.weight" in theirs) == (not tied)


def test_a_transposed_gpt2_layer_goes_to_bitsandbytes_only(tmp_path):
    native = write_native(save_model("gpt2", tmp_path / "model"), tmp_path / "int8")
    export(native, tmp_path / "out", "bitsandbytes")
    again, ours = read_as_native(tmp_path / "out", bitsandbytes_int8), load_file(native / "model.safetensors")
    assert torch.equal(again["transformer.h.0.mlp.c_fc.weight"], ours["transformer.h.0.mlp.c_fc.weight"])
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        export(native, tmp_path / "other", "compressed-tensors")


def test_experts_that_are_joined_when_loaded_go_to_bitsandbytes_only(tmp_path):
    native = write_native(
        save_model("mixtral", tmp_path / "model"), tmp_path / "int8", keep=("embed", "lm_head", "moe")
    )
    export(native, tmp_path / "out", "bitsandbytes")
    skipped = quantization_config(tmp_path / "out")["llm_int8_skip_modules"]
    assert "model.layers.1.block_sparse_moe.experts.0.w1" in skipped
    assert "model.layers.1.block_sparse_moe.gate" in skipped
    with pytest.raises(UnsupportedModelError, match="is put together from weights"):
        export(native, tmp_path / "other", "compressed-tensors")


def test_a_name_that_bitsandbytes_would_take_for_another_is_refused():
    skip, layers = ["mlp.gate"], ["model.mlp.gate", "model.mlp.up"]
    skeleton = Skeleton(parameters={}, linears={}, embeddings=frozenset(), tied={}, kept_in_fp32=())
    with pytest.raises(UnsupportedModelError, match=r"model\.mlp\.gate is int8"):
        format_bitsandbytes._check_skip(skip, skeleton, layers)


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_output_is_replaced_only_when_asked(format, native, tmp_path):
    output = output_for(tmp_path, format)
    first = export(native, output, format)
    with pytest.raises(ConfigurationError, match="--overwrite"):
        export(native, output, format)
    again = export(native, output, format, overwrite=True)
    assert (again.path, again.bytes) == (output, first.bytes)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, OSError])
@pytest.mark.parametrize("format", FORMATS)
def test_whatever_stops_an_export_leaves_what_was_there(format, error, existing, native, tmp_path):
    output = output_for(tmp_path, format)
    marker = output if format == "gguf" else output / "config.json"
    if existing:
        marker.parent.mkdir(exist_ok=True)
        marker.write_text("mine")

    def stop_half_way(done: int, total: int) -> None:
        if 2 * done > total:
            raise error("stopped")

    with pytest.raises(GossamerError if error is OSError else error, match="stopped"):
        export(native, output, format, overwrite=existing, progress=stop_half_way)
    assert [path.name for path in tmp_path.iterdir()] == ([output.name] if existing else [])
    assert not existing or marker.read_text() == "mine"


def test_a_stop_between_the_two_renames_puts_the_old_output_back(native, tmp_path, monkeypatch):
    export(native, tmp_path / "out", "bitsandbytes")
    before = (tmp_path / "out" / "config.json").read_text()
    rename = Path.rename

    def stop_at_the_new_one(path: Path, target: Path) -> Path:
        if path.name == "out" and path.parent != tmp_path:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(scratch, "_exchange", lambda one, other: False)  # a file system that cannot
    monkeypatch.setattr(Path, "rename", stop_at_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        export(native, tmp_path / "out", "compressed-tensors", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == before


def test_progress_ends_at_the_total(native, tmp_path):
    for format in FORMATS:
        seen: list[tuple[int, int]] = []
        export(native, output_for(tmp_path, format), format, overwrite=True, progress=lambda *s, to=seen: to.append(s))
        assert seen[-1][0] == seen[-1][1]
        assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("output", "format", "message"),
    [
        ("{native}", "bitsandbytes", "must not lie in one another"),
        ("{native}/inside", "bitsandbytes", "must not lie in one another"),
        ("{native}/..", "bitsandbytes", "must not lie in one another"),
        ("{tmp}/out", "gguf", "has to end in .gguf"),
        ("{tmp}/out.gguf", "bitsandbytes", "must not end in .gguf"),
        ("{tmp}/missing/out", "bitsandbytes", "does not exist"),
        ("{tmp}/full", "bitsandbytes", "something else than a checkpoint"),
        ("{tmp}/full/file", "bitsandbytes", "is a file"),
        ("{tmp}/out", "awq", "choose one of bitsandbytes, compressed-tensors, gguf"),
    ],
)
def test_an_unusable_output_is_refused(output, format, message, native, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        export(native, output.format(native=native, tmp=tmp_path), format, overwrite=True)
    assert (tmp_path / "full" / "file").read_text() == "mine"


# --- what cannot be exported -----------------------------------------------------------------------------------------


def damage(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.scale"), f"has no {LAYER}.scale"),
        (lambda t: t.update({f"{LAYER}.scale": torch.ones(3)}), f"{LAYER}.scale is torch.float32 [3]"),
        (lambda t: t.update({f"{LAYER}.scale": torch.ones(96, dtype=torch.int32)}), f"{LAYER}.scale is torch.int32"),
        (lambda t: t[f"{LAYER}.scale"].neg_(), f"{LAYER}.scale holds a negative"),
        (lambda t: t[f"{LAYER}.scale"].fill_(float("nan")), f"{LAYER}.scale holds a negative or non-finite"),
        (lambda t: t.update({f"{LAYER}.bias": torch.ones(3, dtype=torch.int8)}), f"{LAYER}.bias is int8 [3]"),
        (lambda t: t.update({f"{LAYER}.outlier_columns": torch.tensor([1])}), "incomplete outlier store"),
        (
            lambda t: t.update(
                {f"{LAYER}.outlier_columns": torch.tensor([64]), f"{LAYER}.outlier_weight": torch.ones(96, 1)}
            ),
            "something else than columns",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(change, message, model, tmp_path):
    native = write_native(model, tmp_path / "int8")
    damage(native, change)
    for format in FORMATS:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            export(native, output_for(tmp_path, format), format)


def test_an_int8_weight_of_no_module_is_refused(model, tmp_path):
    native = write_native(model, tmp_path / "int8")
    damage(native, lambda t: t.update({"x.weight": torch.ones(2, 2, dtype=torch.int8), "x.scale": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"x\.weight is int8, but the model has no"):
        export(native, tmp_path / "out", "bitsandbytes")


def test_another_kind_of_directory_is_refused(model, tmp_path):
    with pytest.raises(ModelNotFoundError, match="is no directory"):
        export(tmp_path / "missing", tmp_path / "out", "bitsandbytes")
    with pytest.raises(ConfigurationError, match="gossamer compress"):
        export(model, tmp_path / "out", "bitsandbytes")
    native = write_native(model, tmp_path / "int8")
    (native / "model.safetensors").write_bytes((native / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        export(native, tmp_path / "out", "bitsandbytes")


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])


def test_the_command_prints_sizes_and_warns(native, tmp_path):
    result = invoke(native, "--format", "compressed-tensors", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "MB in the format compressed-tensors" in result.stdout
    assert "warning: compressed-tensors has no decomposition" in result.stderr


def test_the_command_prints_one_json_object(native, tmp_path):
    result = invoke(native, "-f", "gguf", "-o", tmp_path / "out.gguf", "--json")
    report = json.loads(result.stdout)
    assert report["path"] == str(tmp_path / "out.gguf")
    assert report["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert report["source_bytes"] > report["bytes"]
    assert len(report["warnings"]) == 1


def test_the_command_passes_errors_on(native, tmp_path):
    assert isinstance(invoke(native, "-f", "awq", "-o", tmp_path / "out").exception, ConfigurationError)
    assert invoke(native, "-f", "gguf").exit_code == 2


# --- memory ----------------------------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_the_model_is_never_in_memory_as_a_whole(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 4}
    native = write_native(save_model("llama", tmp_path / "model", **sizes), tmp_path / "int8")
    weights = sum(tensor.numel() * 4 for tensor in dequantized_tensors(native).values())
    assert weights > 110e6
    for format in FORMATS:
        # What the first run allocates stays allocated.
        export(native, output_for(tmp_path, format), format, overwrite=True)
        before, peak = anonymous_memory(), 0

        def watch(done: int, total: int) -> None:
            nonlocal peak
            peak = max(peak, anonymous_memory())

        export(native, output_for(tmp_path, format), format, overwrite=True, progress=watch)
        assert peak - before < 24e6, format


def test_row_blocks_are_the_dequantized_rows_in_the_order_asked_for(model, tmp_path):
    native = write_native(model, tmp_path / "int8", outlier_columns=3)
    expected = dequantized_tensors(native)
    with NativeCheckpoint(native) as source:
        assert len(source.layers) == 14
        for name in ("model.embed_tokens.weight", f"{LAYER}.weight"):
            order = torch.randperm(expected[name].shape[0])
            assert torch.equal(torch.cat(list(source.row_blocks(name))), expected[name])
            assert torch.equal(torch.cat(list(source.row_blocks(name, order))), expected[name][order])
