"""Models with recurrent layers: prefixes are shared with the states behind them, and the tokens stay transformers'."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import RECURRENT, VOCAB, make_model, reference
from gossamer.engine.engine import Engine
from gossamer.engine.states import State
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.models.support import check_supported
from gossamer.native.packing import unsupported
from gossamer.options import SHARING_MODES, EngineOptions
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from gossamer.sampling_params import BeamSearchParams, SamplingParams
from test_exactness import NumberTokenizer, _random_tree, answers, compared, make, prompts_of

Generate = Callable[[list[int], int], list[int]]


def engine_of(model: Any, runner: str = "transformers", **options: Any) -> Engine:
    """Without drafts, which come when they pay: so each run makes the same steps."""
    return Engine(make(runner, model), NumberTokenizer(), EngineOptions(**{"speculation": "off"} | options))


def check_memory(engine: Engine) -> None:
    """The budget holds what nodes have, and states stand behind tokens that are computed."""
    layout = engine.tree.layout
    expected = 0
    for node in engine.tree:
        assert len(node.states) <= node.room
        assert all(0 < place <= node.computed for place in node.states)
        if node.keys is not None:
            expected += len(node) * layout.bytes_per_token + node.room * layout.state_bytes
    assert engine.budget.used == expected == engine.tree.num_bytes
    assert engine.budget.used <= engine.budget.total


@pytest.fixture(scope="module", params=RECURRENT)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[list[int]], list[list[int]]]]:
    yield compared(request.param)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_greedy_tokens_equal_transformers(case: Any, sharing: Any, runner: str) -> None:
    """Cold and warm, whole and in chunks, all at once and a few at a time."""
    model, prompts, expected = case
    check_supported(model.config)
    if runner == "native" and (reason := unsupported(model.config.get_text_config())):
        assert "is not among" in reason
        return
    for chunk, sequences in ((2048, 256), (37, 5)):
        engine = engine_of(model, runner, sharing=sharing, max_num_batched_tokens=chunk, max_num_seqs=sequences)
        assert answers(engine, prompts, 8) == expected
        cold = engine.stats.computed_tokens
        assert answers(engine, prompts, 8) == expected
        warm = engine.stats.computed_tokens - cold
        check_memory(engine)
        # what a sequence left behind is cut where its prompt ends; from there the last state is sought
        assert warm == cold if sharing == "off" else warm < cold / 2


@pytest.fixture(
    scope="module",
    params=[
        *(("transformers", name) for name in ("qwen3_5", "jamba", "lfm2", "mamba2")),
        *(("native", name) for name in ("qwen3_5", "lfm2", "granitemoehybrid", "bamba")),
    ],
)
def model_and_reference(request: pytest.FixtureRequest) -> tuple[Any, str, Generate]:
    """One with a matrix, one whose layers go on token by token, one with convolutions alone, one without attention."""
    runner, name = request.param
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION)
    return model, runner, reference(make_model(name))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_trees(model_and_reference: tuple[Any, str, Generate], data: st.DataObject) -> None:
    """Prompts come in waves: later ones cut what earlier ones have left, wherever states are kept."""
    model, runner, generate = model_and_reference
    prompts = _random_tree(data.draw)
    expected = {tuple(p): generate(p, 3) for p in prompts}
    engine = engine_of(
        model,
        runner,
        sharing=data.draw(st.sampled_from(SHARING_MODES)),
        max_num_batched_tokens=data.draw(st.integers(1, 64)),
        max_num_seqs=data.draw(st.integers(1, 12)),
        state_interval=data.draw(st.integers(1, 40)),
    )
    waves = data.draw(st.lists(st.lists(st.sampled_from(prompts), min_size=1, max_size=6), min_size=1, max_size=5))
    for wave in waves:
        assert answers(engine, wave, 3) == [expected[tuple(p)] for p in wave]
        check_memory(engine)


def test_little_memory_changes_nothing_but_the_time(model_and_reference: tuple[Any, str, Generate]) -> None:
    """Sequences are preempted and computed again, cached prefixes and states evicted: the tokens stay."""
    model, runner, generate = model_and_reference
    prompts = prompts_of([[60], [20, 30], [9, 1, 70, 12, 33, 40]], random.Random(5))
    expected = [generate(p, 90) for p in prompts]
    layout = make(runner, model).layout
    for sharing in SHARING_MODES:
        memory = 500 * layout.bytes_per_token + 5 * layout.state_bytes
        engine = engine_of(model, runner, sharing=sharing, memory=memory, state_interval=16)
        for _ in range(2):
            assert answers(engine, prompts, 90) == expected
            check_memory(engine)
        assert engine.stats.preemptions or engine.stats.evicted_tokens or not layout.layers
        assert engine.budget.peak <= engine.budget.total


def test_a_cut_prefix_is_gone_through_again_from_the_last_state() -> None:
    model = make_model("qwen3_5")
    generate = reference(make_model("qwen3_5"))
    model.set_attn_implementation(IMPLEMENTATION)
    engine = engine_of(model, state_interval=100)
    first = random.Random(0).choices(range(VOCAB), k=450)
    second, third = first[:330] + [5] * 20, first[:330] + [6] * 20
    for prompt, computed in ((first, 450), (second, 30 + 20), (third, 20)):
        before = engine.stats.computed_tokens
        assert answers(engine, [prompt], 1) == [generate(prompt, 1)]
        # 300 is the last state before the cut at 330, which has one from then on
        assert engine.stats.computed_tokens - before == computed
    check_memory(engine)


def test_many_sequences_compute_their_prefix_once() -> None:
    model = make_model("qwen3_5", max_position_embeddings=4096)
    model.set_attn_implementation(IMPLEMENTATION)
    prefix = random.Random(1).choices(range(VOCAB), k=2048)
    prompts = [[*prefix, *random.Random(i).choices(range(VOCAB), k=16)] for i in range(64)]
    engine, apart = engine_of(model), engine_of(model, sharing="off")
    assert answers(engine, prompts, 2) == answers(apart, prompts, 2)
    assert engine.stats.computed_tokens <= 2048 + 64 * 17
    assert apart.stats.computed_tokens > 40 * engine.stats.computed_tokens
    shared = max(engine.tree, key=len)
    assert len(shared) == 2048 and len(shared.states) <= 1 + 2048 // engine.scheduler.state_interval


def collect(engine: Engine) -> dict[str, Any]:
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[output.request_id] = output
    return done


def test_samples_beams_and_scores_are_those_without_sharing(model_and_reference: tuple[Any, str, Generate]) -> None:
    model, runner, _ = model_and_reference
    head = random.Random(2).choices(range(VOCAB), k=70)
    results = []
    for options in ({}, {"max_num_batched_tokens": 23, "max_num_seqs": 3}, {"sharing": "off"}):
        engine = engine_of(model, runner, **options)
        for i in range(3):
            prompt = {"prompt_token_ids": [*head, 7 + i, *range(20 + i)]}
            params = SamplingParams(n=3, temperature=0.9, top_p=0.8, seed=i, max_tokens=9, ignore_eos=True)
            engine.add_request(f"n{i}", prompt, params)
            engine.add_beam_search(f"b{i}", prompt, BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True))
            engine.add_score(f"s{i}", prompt, [(None, [1, 2, 3]), (None, [4])])
        done = collect(engine)
        check_memory(engine)
        results.append(
            (
                [[each.token_ids for each in done[f"n{i}"].outputs] for i in range(3)],
                [[beam.token_ids for beam in done[f"b{i}"].sequences] for i in range(3)],
                [[round(each.logprob, 3) for each in done[f"s{i}"].continuations] for i in range(3)],
            )
        )
    assert results[0] == results[1] == results[2]


def test_pins_and_salts() -> None:
    model = make_model("qwen3_5")
    model.set_attn_implementation(IMPLEMENTATION)
    layout = TransformersRunner(model).layout
    engine = engine_of(model, memory=300 * layout.bytes_per_token + 4 * layout.state_bytes)
    head = random.Random(3).choices(range(VOCAB), k=64)
    engine.pin({"prompt_token_ids": head})
    expected = answers(engine, [[*head, 9]], 4)
    for i in range(5):  # others need the memory
        answers(engine, [random.Random(10 + i).choices(range(VOCAB), k=150)], 4)
    before = engine.stats.computed_tokens
    assert answers(engine, [[*head, 9]], 4) == expected
    assert engine.stats.computed_tokens - before == 4
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add_request("salted", {"prompt_token_ids": [*head, 9], "cache_salt": "other"}, params)
    before = engine.stats.computed_tokens
    collect(engine)
    assert engine.stats.computed_tokens - before == 65
    check_memory(engine)


def test_a_state_that_is_not_finite_fails_its_request_alone() -> None:
    model = make_model("qwen3_5")
    generate = reference(make_model("qwen3_5"))
    model.set_attn_implementation(IMPLEMENTATION)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.inf
    engine = engine_of(model, max_num_batched_tokens=50)
    head = random.Random(4).choices([3, 4, 5], k=40)
    sound, broken = [*head, *range(90, 120), 1], [*head, 77, *range(90, 120), 1]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for name, prompt in (("broken", broken), ("sound", sound), ("also", [*head, 8])):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    done = collect(engine)
    assert "not finite" in str(done["broken"].error)
    for name, prompt in (("sound", sound), ("also", [*head, 8])):
        assert done[name].outputs[0].token_ids == generate(prompt, 6)
    assert engine.tree.match(broken) == 40 and not any(77 in node.tokens for node in engine.tree)
    check_memory(engine)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative_config": {"method": "ngram"}}, "speculative_config"),
        ({"prefix_dir": "prefixes"}, "prefix_dir"),
        ({"state_interval": 0}, "state_interval"),
    ],
)
def test_what_needs_keys_and_values_alone_is_refused(options: dict[str, Any], named: str, tmp_path: Any) -> None:
    model = make_model("qwen3_5")
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(ConfigurationError, match=named):
        engine_of(model, **{"speculation": "auto"} | options)
    assert engine_of(model, speculation="auto").speculator is None
    assert engine_of(model, "native", speculation="auto").speculator is not None


def test_a_layer_that_keeps_its_state_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_5")
    model.model.layers[0].linear_attn.layer_idx = 1
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(UnsupportedModelError, match="layer"):
        TransformersRunner(model)


def test_a_state_apart_holds_its_own_memory() -> None:
    state = State([torch.arange(12.0).view(3, 4), torch.empty(3, 0)], 2)
    own = state.apart()
    assert [tensor.tolist() for tensor in own.tensors()] == [[8.0, 9.0, 10.0, 11.0], []]
    assert own.batch[0].untyped_storage().nbytes() == 16
    assert own.apart() is own and own.finite
