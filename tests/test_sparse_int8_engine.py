"""The engine with int8 layers without their zeros: the same tokens, and the faster form of each layer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from architectures import make_model
from gossamer import quantize
from gossamer.engine.engine import Engine
from gossamer.kernels.library import instruction_set
from gossamer.native import sparse_timing
from gossamer.native.sparse_timing import SparsePacker, SparseTiming
from gossamer.nn import Int8Linear, SparseInt8Linear
from gossamer.nn.int8_linear import Decomposition
from gossamer.options import RunnerOptions
from gossamer.runners.choose import make_runner
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION
from sparse_layers import ISAS, dense_layer, kinds, needs_native, prune
from test_exactness import NumberTokenizer, answers

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
        packed = runner.report().sparse_weights
        assert packed is not None
        assert packed["sparse" if way == "on" else "dense"] == 8 and packed["choice"] == way
        found.append(answers(Engine(runner, NumberTokenizer()), PROMPTS, 12))
        sizes.append(runner.weight_bytes)
    assert found[0] == found[1]


def test_transformers_multiplies_layers_that_have_their_zeros() -> None:
    for way, kind in (("auto", Int8Linear), ("on", SparseInt8Linear)):
        network = pruned_network()
        make_runner(network, RunnerOptions("transformers", sparse_weights=way), max_rows=64)  # type: ignore[arg-type]  # a literal
        assert kinds(network) == {kind}


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
