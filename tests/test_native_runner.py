"""What surrounds the native program: where it is chosen, forks, threads, bad steps."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from architectures import make_model
from gossamer.engine.engine import Engine
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import instruction_set, instruction_sets
from gossamer.models.quantize import quantize
from gossamer.nn.int8_head import quantize_head
from gossamer.options import EngineOptions, RunnerOptions
from gossamer.runners.choose import make_runner
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from gossamer.sampling_params import SamplingParams
from test_exactness import NumberTokenizer, answers

needs_native = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [1]]


def network(name: str = "llama") -> Any:
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def native(threads: int = 2, **changes: Any) -> Engine:
    return Engine(NativeRunner(network(), max_rows=64, threads=threads), NumberTokenizer(), EngineOptions(**changes))


def finish(engine: Engine) -> dict[str, Any]:
    """The last output of each request."""
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step()}
    return done


def scores(runner: Any, text: Sequence[int] = range(40)) -> torch.Tensor:
    """Log-likelihoods of the tokens of a text."""
    engine = Engine(runner, NumberTokenizer())
    engine.add_score("score", {"prompt_token_ids": list(text)})
    return torch.tensor(finish(engine)["score"].token_logprobs[1:])


def scores_of(model: Any, text: Sequence[int]) -> torch.Tensor:
    """The same by a model of transformers."""
    ids = torch.tensor(list(text))
    with torch.inference_mode():
        every = model(ids[None]).logits[0].log_softmax(-1)
    return every[:-1].gather(1, ids[1:, None])[:, 0]


def compiler() -> str | None:
    """A C++ compiler that the build would have found."""
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, [*named[:1], "c++", "g++", "clang++"])), None)


@pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="no C++ compiler on Linux")
@pytest.mark.skipif(bool(os.environ.get("GOSSAMER_ISA")), reason="the instruction set is chosen by hand")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """A build that went wrong installs a package that works, and skips every test of the kernels."""
    assert instruction_sets(), f"{compiler()} is there, but the native kernels are not: pip install -v -e . says why"


def test_reference_switches_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    assert instruction_set() is None
    made, note = make_runner(network(), RunnerOptions("auto"), max_rows=64)
    assert isinstance(made, TransformersRunner) and "switched off" in note
    with pytest.raises(UnsupportedModelError, match="switched off"):
        make_runner(network(), RunnerOptions("native"), max_rows=64)


def test_an_instruction_set_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", "avx1024")
    with pytest.raises(ConfigurationError, match=r"avx1024.*reference"):
        instruction_set()


@needs_native
def test_unsupported_models_go_to_transformers_with_the_reason() -> None:
    made, note = make_runner(network("opt"), RunnerOptions("auto"), max_rows=64)
    assert isinstance(made, TransformersRunner) and "opt is not among llama" in note


@needs_native
def test_layers_that_cannot_be_packed_together_leave_the_model_whole() -> None:
    """A partly quantized model runs on transformers, with all of its weights."""
    model = network()
    quantize(model, skip=("q_proj", "lm_head"))
    made, note = make_runner(model, RunnerOptions("auto"), max_rows=64)
    assert isinstance(made, TransformersRunner) and "partly int8" in note
    assert len(answers(Engine(made, NumberTokenizer()), PROMPTS, 4)) == 3


@needs_native
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("outliers", ["token", "batch", None])
def test_int8_logits_are_near_the_reference(isa: str, outliers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes and scales; keys, values and the output layer are bf16 here and fp32 there."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    found = []
    for kind in (TransformersRunner, lambda model: NativeRunner(model, max_rows=64)):
        model = network("qwen3")
        quantize(model, outliers=outliers)
        found.append(scores(kind(model)))
    reference, ours = found
    assert (reference - ours).abs().mean() < 0.1 * reference.std()


@needs_native
@pytest.mark.parametrize("isa", instruction_sets())
def test_with_keys_and_values_in_fp32_only_the_order_of_sums_differs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of int8 layers alone, whose embedding is in bf16 anyway."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    found = {}
    for kind in ("reference", "float32", "bfloat16", "int8"):
        model = network("qwen3").bfloat16().float()
        quantize(model)
        quantize_head(model)
        runner: Any = (
            TransformersRunner(model)
            if kind == "reference"
            else NativeRunner(model, RunnerOptions(kv_dtype=kind), max_rows=64)
        )
        assert kind == "reference" or runner.layout.dtype == getattr(torch, kind)
        found[kind] = scores(runner)
    error = {kind: float((found[kind] - found["reference"]).abs().mean() / found["reference"].std()) for kind in found}
    assert error["float32"] < 0.002 and error["float32"] < error["bfloat16"] < error["int8"] < 0.05


@needs_native
@pytest.mark.parametrize("sharing", ["off", "storage", "attention"])
@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_int8_keys_and_values_are_shared_split_and_moved_like_others(name: str, sharing: Any) -> None:
    """What is decoded over a shared prefix, from slots that grow, is as probable as when it is scored on its own."""
    runner = NativeRunner(network(name), RunnerOptions(kv_dtype="int8"), max_rows=512, threads=2)
    layout = runner.layout
    assert layout.bytes_per_token == sum(x.num_kv_heads * 2 * (x.key_dim + 4) for x in layout.layers)
    engine = Engine(runner, NumberTokenizer(), EngineOptions(sharing=sharing))
    prompts = [[*range(1, 30), *range(1 + 7 * i % 5, 20)] for i in range(6)] + PROMPTS
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=0)
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    decoded = finish(engine)
    for number, prompt in enumerate(prompts):
        output = decoded[str(number)].outputs[0]
        alone = scores(runner, prompt + output.token_ids)[-80:]
        entries = zip(output.logprobs, output.token_ids, strict=True)
        difference = (torch.tensor([entry[token].logprob for entry, token in entries]) - alone).abs()
        assert difference.mean() < 0.02
        assert name != "llama" or difference.max() < 0.05  # of five layers, a code that rounds apart may do more


@needs_native
def test_layers_that_attend_to_the_keys_of_others_keep_none() -> None:
    runner = NativeRunner(network("gemma4"), max_rows=64)  # five layers, of which the last two have none of their own
    assert [(shape.num_kv_heads, shape.key_dim) for shape in runner.layout.layers] == [(2, 16), (2, 32), (2, 16)]
    assert runner.decoder.wanted_from == 3  # no later token will look at what these two compute
    assert NativeRunner(network(), max_rows=64).decoder.wanted_from == 2
    assert TransformersRunner(network("gemma4")).layout.bytes_per_token == 2 * 2 * 4 * (3 * 16 + 2 * 32)
    with pytest.raises(ConfigurationError, match="prefix_eps cannot be used: the heads"):
        NativeRunner(network("gemma4"), RunnerOptions(prefix_eps=0.1), max_rows=64)


def test_a_type_of_keys_that_does_not_exist_or_does_not_apply_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="kv_dtype must be 'auto', 'float32', 'bfloat16', 'int8', got 'int4'"):
        RunnerOptions(kv_dtype="int4")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigurationError, match="that of transformers keeps the model's own type"):
        RunnerOptions("transformers", kv_dtype="float32")


@needs_native
def test_any_number_of_threads_gives_the_same_tokens() -> None:
    expected = answers(native(1), PROMPTS, 12)
    assert all(answers(native(threads), PROMPTS, 12) == expected for threads in (2, 3, 5))


@needs_native
def test_two_engines_at_once() -> None:
    expected = answers(native(), PROMPTS, 20)
    found: list[Any] = []
    engines = [native(), native()]
    threads = [threading.Thread(target=lambda e=e: found.append(answers(e, PROMPTS, 20))) for e in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected, expected]


@needs_native
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_goes_on() -> None:
    """OpenMP's threads do not survive a fork; a child that waited for them would hang."""
    engine = native()
    expected = answers(engine, PROMPTS, 8)
    child = os.fork()
    if child == 0:
        os._exit(0 if answers(engine, PROMPTS, 8) == expected else 1)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
