"""int8 layers without their zeros: the same numbers in less memory, in modules, kernels, checkpoints and exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from architectures import make_model
from gossamer import LLM, GossamerInt8Config, SamplingParams, quantize
from gossamer.compress.export import export
from gossamer.compress.int8 import compress_int8
from gossamer.engine.attention import IMPLEMENTATION
from gossamer.engine.engine import Engine
from gossamer.engine.native_runner import NativeRunner
from gossamer.engine.runners import make_runner
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.models.load import load_model
from gossamer.native import sparse_timing
from gossamer.native.library import instruction_set, instruction_sets
from gossamer.native.sparse_timing import SparsePacker, SparseTiming
from gossamer.native.weights import pack_linear
from gossamer.nn import Int8Linear, SparseInt8Linear
from gossamer.nn.int8_linear import Decomposition
from gossamer.nn.sparse_int8_linear import check_codes, dense, pack_codes, sparse_if_smaller, unpack_codes
from gossamer.options import RunnerOptions
from native_checkpoints import save_model
from test_exactness import NumberTokenizer, answers

needs_native = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
ISAS = instruction_sets()
SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 65, 130, 300])
DENSITIES = st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0])
RULES = [
    Decomposition(outliers=None),
    Decomposition(3.0, "relative", "token"),
    Decomposition(2.0, "absolute", "batch"),
    Decomposition(6.0, "relative", "static"),
]


def codes_of(rows: int, columns: int, density: float) -> Tensor:
    """(rows, columns) int8, -128 included; about ``density`` of them are not zero."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return codes * (torch.rand(rows, columns) < density)


def prune(model: nn.Module, share: float = 0.5) -> None:
    """The smallest weights of every linear layer become zero."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                size = layer.weight.abs()
                layer.weight[size < size.flatten().kthvalue(max(1, int(share * size.numel()))).values] = 0


def dense_layer(
    outputs: int, inputs: int, density: float, *, bias: bool, stored: int, rule: Decomposition
) -> Int8Linear:
    columns = torch.randperm(inputs)[:stored].sort().values if stored else None
    layer = Int8Linear.from_linear(nn.Linear(inputs, outputs, bias), decomposition=rule, outlier_columns=columns)
    layer.weight = codes_of(outputs, inputs, density)
    return layer


# --- the form --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=SIZES, columns=SIZES, density=DENSITIES, seed=st.integers(0, 2**32))
def test_nothing_is_lost(rows: int, columns: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    codes = codes_of(rows, columns, density)
    kept, mask = pack_codes(codes)
    assert len(kept) == codes.count_nonzero() and mask.shape == (rows, (columns + 7) // 8)
    assert torch.equal(unpack_codes(kept, mask, columns), codes)
    check_codes("layer", kept, mask, torch.tensor(codes.shape))


def test_a_weight_of_several_pieces_is_put_together_again() -> None:
    codes = codes_of(700, 1003, 0.5)  # pieces are about 1 MB in floating point
    assert torch.equal(unpack_codes(*pack_codes(codes), 1003), codes)
    assert unpack_codes(*pack_codes(codes[:0]), 1003).shape == (0, 1003)


def test_a_layer_keeps_what_it_computes() -> None:
    layer = dense_layer(24, 40, 0.5, bias=True, stored=3, rule=Decomposition(3.0))
    sparse, x = SparseInt8Linear.from_int8(layer), torch.randn(5, 40)
    assert torch.equal(sparse(x), layer(x)) and torch.equal(sparse.to_int8()(x), layer(x))
    assert torch.equal(sparse.dequantize().weight, layer.dequantize().weight)
    half = sparse.bfloat16()
    assert half.bias is not None and half.bias.dtype == torch.bfloat16 and half.scale.dtype == torch.float32
    assert half.weight_codes.dtype == torch.int8 and half.weight_mask.dtype == torch.uint8
    assert "nonzeros=" in repr(sparse)
    linear = nn.Linear(40, 24)
    assert torch.equal(SparseInt8Linear.from_linear(linear)(x), Int8Linear.from_linear(linear)(x))
    model = nn.Sequential(sparse)
    dense(model)
    assert type(model[0]) is Int8Linear
    with pytest.raises(ConfigurationError, match="to_int8"):
        dense(sparse)


@pytest.mark.parametrize(("share", "expected"), [(0.0, Int8Linear), (0.1, Int8Linear), (0.4, SparseInt8Linear)])
def test_only_what_becomes_smaller_becomes_sparse(share: float, expected: type) -> None:
    linear = nn.Linear(128, 64)
    prune(nn.Sequential(linear), share)
    layer = sparse_if_smaller(Int8Linear.from_linear(linear))
    assert type(layer) is expected
    assert sparse_if_smaller(layer) is layer


def test_quantizing_a_pruned_model_reports_what_leaving_zeros_out_saves() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64))
    prune(nn.Sequential(model[0]))
    report = quantize(model)
    assert type(model[0]) is SparseInt8Linear and type(model[1]) is Int8Linear
    first, second = report.layers
    assert first.bytes_after + first.saved_bytes == 512 * 512 + 4 * 512 and second.saved_bytes == 0
    assert first.bytes_after == sum(buffer.nbytes for buffer in model[0].buffers())
    assert first.bytes_after < 0.64 * (first.bytes_after + first.saved_bytes)
    assert "1 of them stored without their zeros" in str(report)


# --- kernels ---------------------------------------------------------------------------------------------------------


@needs_native
@settings(max_examples=120, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.integers(1, 70),
    inputs=SIZES,
    outputs=SIZES,
    density=DENSITIES,
    rule=st.sampled_from(RULES),
    bias=st.booleans(),
    stored=st.sampled_from([0, 1, 3]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
)
def test_products_are_equal_to_the_bit(
    isa: str,
    rows: int,
    inputs: int,
    outputs: int,
    density: float,
    rule: Decomposition,
    bias: bool,
    stored: int,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    stored = max(min(stored, inputs), rule.outliers == "static")
    layer = dense_layer(outputs, inputs, density, bias=bias, stored=stored, rule=rule)
    x = torch.randn(rows, inputs)
    x = torch.where(torch.rand(rows, inputs) < 0.05, x * 20, x)
    full = pack_linear([layer], isa, "float32")
    expected = full(x, threads=threads)
    packed = pack_linear([SparseInt8Linear.from_int8(layer)], isa, "float32", sparse=True)
    assert torch.equal(packed(x, threads=threads), expected)
    assert torch.equal(packed(x[:1]), full(x[:1])) and torch.equal(packed(x[:2]), full(x[:2]))
    copy = replace(packed, handle=packed.handle.copy())
    assert torch.equal(copy(x), expected)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_exact_at_their_extremes(isa: str) -> None:
    """All codes at the ends of their range, so that sums of 16 and 32 bits come as far as they can."""
    inputs = 4099
    layer = dense_layer(33, inputs, 1.0, bias=False, stored=0, rule=Decomposition(outliers=None))
    layer.scale.fill_(1.0)
    for code in (-128, -127, 127):
        layer.weight.fill_(code)
        packed = pack_linear([layer], isa, "float32", sparse=True)
        for rows, value in ((1, -1.0), (2, 1.0), (9, -1.0)):
            found = packed(torch.full((rows, inputs), value * 127))
            assert torch.equal(found, torch.full((rows, 33), float(code * value * 127 * inputs)))


@needs_native
def test_half_zeros_take_at_most_0_64_of_the_memory() -> None:
    layer = dense_layer(2048, 2048, 0.5, bias=False, stored=31, rule=Decomposition())
    isa = ISAS[0]
    sparse, full = (pack_linear([layer], isa, "float32", sparse=way).handle.bytes for way in (True, False))
    assert sparse <= 0.64 * full


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same pruned model in int8, without its zeros and with them."""
    base = tmp_path_factory.mktemp("sparse")
    save_model("llama_biases", base / "plain")
    model = AutoModelForCausalLM.from_pretrained(base / "plain")
    prune(model.model)
    model.save_pretrained(base / "plain")
    compress_int8(base / "plain", base / "sparse", GossamerInt8Config(outlier_store=0.05))
    shutil.copytree(base / "sparse", base / "dense")
    tensors = load_file(base / "sparse" / "model.safetensors")
    for path in [name.removesuffix(".weight_codes") for name in tensors if name.endswith(".weight_codes")]:
        kept, mask, shape = (tensors.pop(f"{path}.weight_{last}") for last in ("codes", "mask", "shape"))
        tensors[f"{path}.weight"] = unpack_codes(kept, mask, int(shape[1]))
    save_file(tensors, base / "dense" / "model.safetensors", metadata={"format": "pt"})
    return base / "sparse", base / "dense"


def kinds(model: Any) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, Int8Linear)}


def test_a_checkpoint_is_read_and_written_as_it_is(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    sparse, full = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in checkpoints)
    assert kinds(sparse) == {SparseInt8Linear} and kinds(full) == {Int8Linear}
    tokens = torch.randint(3, 199, (2, 20))
    with torch.no_grad():
        assert torch.equal(sparse(tokens).logits, full(tokens).logits)
        sparse.save_pretrained(tmp_path, max_shard_size="50KB")
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert kinds(again) == {SparseInt8Linear}
        assert torch.equal(again(tokens).logits, full(tokens).logits)
        body = AutoModelForCausalLM.from_pretrained(checkpoints[0]).model
        body.save_pretrained(tmp_path / "body")
    smaller, larger = ((path / "model.safetensors").stat().st_size for path in checkpoints)
    assert smaller < larger


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "gemma3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Transposed, fused and renamed weights; quantized in memory, and while they are read."""
    original = make_model(name)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 2:
                parameter[parameter.abs() < 0.8 * parameter.abs().mean()] = 0
    original.save_pretrained(tmp_path / "plain")
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=GossamerInt8Config(), **options
    )
    assert SparseInt8Linear in kinds(model)
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", **options)
    tokens = torch.randint(3, 199, (2, 20))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("format_", ["bitsandbytes", "compressed-tensors", "gguf"])
def test_exports_are_those_of_the_dense_form(format_: Any, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for number, source in enumerate(checkpoints):
        target = tmp_path / str(number) / ("model.gguf" if format_ == "gguf" else "model")
        target.parent.mkdir()
        export(source, target, format_)
        found.append(target)
    if format_ == "gguf":
        first, second = (path.read_bytes() for path in found)
        # the name of the directory is in the metadata
        assert first.replace(b"sparse", b"").replace(b"Sparse", b"")[-10_000:] == second[-10_000:]
        assert abs(len(first) - len(second)) < 64
        return
    tensors, expected = (load_file(path / "model.safetensors") for path in found)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def damage_mask(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight_mask"][0, 0] ^= 1


def damage_codes(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight_codes"] = tensors[f"{path}.weight_codes"][:-1].clone()


def damage_rows(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight_mask"] = tensors[f"{path}.weight_mask"][:-1].clone()


def damage_shape(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight_shape"][1] -= 1


def remove_mask(tensors: dict[str, Tensor], path: str) -> None:
    del tensors[f"{path}.weight_mask"]


def add_weight(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight"] = torch.zeros(2, 2)


def wrong_type(tensors: dict[str, Tensor], path: str) -> None:
    tensors[f"{path}.weight_codes"] = tensors[f"{path}.weight_codes"].to(torch.int16)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_mask, r"up_proj\.weight_mask marks \d+ codes, but .*weight_codes holds \d+"),
        (damage_codes, r"up_proj\.weight_mask marks \d+ codes, but .*weight_codes holds \d+"),
        (damage_rows, r"up_proj\.weight_mask is .*\[95, 8\].*\[96, 8\]"),
        (damage_shape, r"up_proj\.weight_(shape says|mask has bits)"),
        (remove_mask, r"up_proj\.weight_mask is missing"),
        (add_weight, r"up_proj has both"),
        (wrong_type, r"up_proj\.weight_codes is torch\.int16"),
    ],
)
def test_damage_is_named(
    damage: Callable[[dict[str, Tensor], str], None], says: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints[0], broken)
    tensors = load_file(broken / "model.safetensors")
    damage(tensors, "model.layers.1.mlp.up_proj")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        load_model(broken)
    with pytest.raises(CheckpointError, match=r"up_proj"):
        export(broken, tmp_path / "out", "bitsandbytes")
    assert not (tmp_path / "out").exists()


def test_bits_beyond_the_last_column_are_damage() -> None:
    kept, mask = pack_codes(codes_of(4, 9, 1.0))
    mask[2, 1] |= 2
    with pytest.raises(CheckpointError, match="bits set beyond the 9 columns"):
        check_codes("layer", kept, mask, torch.tensor([4, 9]))


# --- the engine ------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [1]]


def pruned_network() -> Any:
    model = make_model("qwen3")
    prune(model.model)
    quantize(model)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_a_model_gives_the_same_tokens_in_either_form(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    found, sizes = [], []
    for way in ("on", "off"):
        runner = NativeRunner(pruned_network(), RunnerOptions(sparse_weights=way), max_rows=64)  # type: ignore[arg-type]  # a literal
        packed = runner.sparse_weights
        assert packed["sparse" if way == "on" else "dense"] == 8 and packed["choice"] == way
        found.append(answers(Engine(runner, NumberTokenizer()), PROMPTS, 12))
        sizes.append(runner.weight_bytes)
    assert found[0] == found[1]


def test_transformers_multiplies_layers_that_have_their_zeros() -> None:
    for way, kind in (("auto", Int8Linear), ("on", SparseInt8Linear)):
        network = pruned_network()
        make_runner(network, RunnerOptions("transformers", sparse_weights=way), max_rows=64)  # type: ignore[arg-type]  # a literal
        assert kinds(network) == {kind}


def test_llm_reads_a_sparse_checkpoint(checkpoints: tuple[Path, Path]) -> None:
    outputs = []
    for path, way, runner in ((0, "on", "auto"), (0, "auto", "auto"), (1, "auto", "auto"), (0, "auto", "transformers")):
        llm = LLM(checkpoints[path], sparse_weights=way, runner=runner)  # type: ignore[arg-type]  # a literal
        output = llm.generate("The speed of", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
        outputs.append(output.outputs[0].token_ids)
    assert outputs[0] == outputs[1] == outputs[2]
    with pytest.raises(ConfigurationError, match="sparse_weights must be 'auto', 'on', 'off', got 'yes'"):
        LLM(checkpoints[0], sparse_weights="yes")  # type: ignore[arg-type]  # wrong on purpose


@needs_native
def test_auto_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseInt8Linear.from_int8(dense_layer(600, 600, 0.5, bias=False, stored=0, rule=Decomposition()))
    isa = instruction_set() or ISAS[0]
    for *ratios, expected in (
        (1.3, 1.0, 0.98, 1),
        (1.3, 0.98, 1.1, 1),
        (1.3, 0.9, 1.1, 0),
        (1.3, 1.1, 0.9, 0),
        (1, 1, 1, 0),
    ):
        monkeypatch.setattr(sparse_timing, "_measured", {})
        timing = SparseTiming(600, 600, 0.5, *ratios)
        monkeypatch.setattr(sparse_timing, "_measure", lambda *arguments, timing=timing: timing)
        pack = SparsePacker(isa, "float32", 1)
        pack([layer])
        assert pack.sparse == expected and pack.dense == 1 - expected
        assert pack.summary()["timings"][0]["one_row"] == ratios[0]
    pack = SparsePacker(isa, "float32", 1, "off")
    pack([layer])
    assert pack.dense == 1 and not pack.timings


@needs_native
def test_timing_measures_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_timing, "_measured", {})
    monkeypatch.setattr(sparse_timing, "_COPIES_BYTES", 1 << 20)
    layer = SparseInt8Linear.from_int8(dense_layer(600, 600, 0.5, bias=False, stored=3, rule=Decomposition()))
    pack = SparsePacker(ISAS[0], "float32", 1)
    for _ in range(2):
        pack([layer])
    (timing,) = pack.summary()["timings"]
    assert timing["outputs"] == timing["inputs"] == 600 and timing["nonzeros"] == 0.5
    assert all(0.05 < timing[rows] < 20 for rows in ("one_row", "few_rows", "many_rows"))
    assert json.dumps(pack.summary())
