"""Prefixes on disk: what comes back after a restart is what was computed, to the bit, or nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from architectures import VOCAB, make_model
from gossamer import LLM, SamplingParams
from gossamer.engine.engine import Engine
from gossamer.engine.prefix_store import PrefixStore
from gossamer.engine.prefix_store import store as store_module
from gossamer.engine.prefix_store.format import pack
from gossamer.engine.prefix_store.index import LEAST_TOKENS
from gossamer.engine.tree import Node
from gossamer.errors import ConfigurationError
from gossamer.options import EngineOptions
from gossamer.runners.transformers import IMPLEMENTATION
from test_exactness import NumberTokenizer, answers, make
from test_prefix_tree import Path as Text
from test_prefix_tree import compute, holds_its_content, new_tree, texts

TINY_CONTEXT = 512
SECONDS = 60.0
DIGEST = "a" * 64
LOGGER = "gossamer.prefixes"


KEPT = "kept salt"  # whose prefixes may be written


def digest_of(salt: str) -> str:
    return hashlib.sha256(salt.encode()).hexdigest()


def make_store(directory: Path, tree: Any, *, size: int = 1 << 30, model: str = DIGEST) -> PrefixStore:
    return PrefixStore(directory, size, tree, model=model, vocab_size=1000, salts=[digest_of(KEPT)])


class Disk(RuleBasedStateMachine):
    """Prompts come, are kept, evicted and restored over restarts, whatever nodes the tree has made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.uses: dict[tuple[str | None, Text], int] = {}  # of this process
        self.answered: set[tuple[str | None, Text]] = set()
        self.written: set[tuple[str | None, Text]] = set()
        self.restart()

    @rule()
    def restart(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.tree = new_tree(1000)
        self.store = make_store(self.directory, self.tree)
        self.uses.clear()

    @rule(text=texts, salt=st.sampled_from([None, KEPT]))
    def answer(self, text: Text, salt: str | None) -> None:
        """As the engine does."""
        self.store.restore(list(text), salt)
        least, most = (
            max((i for i in range(len(text) + 1) if (salt, text[:i]) in known), default=0)
            for known in (self.written, self.answered)
        )
        assert least <= self.tree.match(text, salt) <= most  # never what only another salt has computed
        self.tree.unlock(self.filled(text, salt))
        self.store.keep(list(text), salt)
        assert self.store.wait(SECONDS)
        self.uses[salt, text] = self.uses.get((salt, text), 0) + 1
        prefixes = {(salt, text[: i + 1]) for i in range(len(text))}
        self.answered |= prefixes
        if self.uses[salt, text] >= store_module.HOT_USES:
            self.written |= prefixes

    def filled(self, text: Text, salt: str | None) -> Node:
        node = self.tree.insert(text, salt)
        self.tree.lock(node)
        for each in node.path():
            assert self.tree.allocate(each)
            compute(each, len(each) - each.computed)
        return node

    @rule(text=texts)
    def answer_with_a_salt(self, text: Text) -> None:
        for _ in range(store_module.HOT_USES):
            self.tree.unlock(self.filled(text, "salt"))
            before = set(os.listdir(self.directory))
            self.store.keep(list(text), "salt")
            assert self.store.wait(SECONDS) and set(os.listdir(self.directory)) == before

    @rule(wanted=st.integers(0, 20))
    def evict(self, wanted: int) -> None:
        self.tree.evict(wanted * self.tree.layout.bytes_per_token)
        self.uses.clear()  # what is evicted has to become hot again

    @invariant()
    def every_token_has_its_keys(self) -> None:
        assert all(holds_its_content(node) for node in self.tree)
        assert self.tree.num_bytes == self.tree.budget.used

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)


@pytest.fixture
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEAST_TOKENS", 1)


@pytest.mark.usefixtures("short_prefixes")
def test_whatever_happens_tokens_come_back_with_their_keys() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Disk, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))


# --- through the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma4"])
def model(request: pytest.FixtureRequest) -> Any:
    model = make_model(request.param)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_greedy_tokens_after_a_restart_are_those_without_a_disk(runner: str, model: Any, tmp_path: Path) -> None:
    made = make(runner, model)

    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 2**32), parents=st.lists(st.integers(0, 5), min_size=1, max_size=5))
    def check(seed: int, parents: list[int]) -> None:
        generator = random.Random(seed)
        prompts: list[list[int]] = [[]]
        for parent in parents:
            above = prompts[parent % len(prompts)]
            prompts.append(above + generator.choices(range(VOCAB), k=generator.randint(1, 150)))
        prompts = [[*prompt, 1] for prompt in prompts[1:]]
        directory = Path(tempfile.mkdtemp(dir=tmp_path))  # of its own, also when hypothesis tries the same again

        def engine(**options: Any) -> Engine:
            return Engine(
                made, NumberTokenizer(), EngineOptions(max_num_batched_tokens=64, **options), kv_digest=DIGEST
            )

        expected = answers(engine(), prompts, 6)
        first = engine(prefix_dir=directory)
        assert answers(first, prompts, 6) == expected == answers(first, prompts, 6)
        first.close()
        held = {tuple(path): keys for path, keys in _tokens_of(first)}
        second = engine(prefix_dir=directory)
        assert second.store is not None
        for prompt in prompts:
            second.store.restore(prompt[:-1], None)
        for path, keys in _tokens_of(second):
            assert all(torch.equal(one, other) for one, other in zip(keys, held[tuple(path)], strict=True))
        assert answers(second, prompts, 6) == expected
        longest = max(map(len, prompts)) - 1
        if longest >= 2 * LEAST_TOKENS:  # fewer than the least are not worth a file
            assert second.store.stats.restored_tokens > longest - LEAST_TOKENS
        assert second.stats.computed_tokens <= first.stats.computed_tokens - second.store.stats.restored_tokens
        second.close()
        shutil.rmtree(directory)

    check()


def _tokens_of(engine: Engine) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Every computed token, by all tokens up to it, and its keys and values in each layer."""
    for node in engine.tree:
        tokens = [token for each in node.path() for token in each.tokens]
        for place in range(node.computed):
            tensors = [*(node.keys or []), *(node.values or [])]
            yield tokens[: node.start + place + 1], [each[:, place] for each in tensors]


PREFIX = {"prompt_token_ids": [1 + i % 200 for i in range(300)]}
GREEDY = SamplingParams(temperature=0, max_tokens=4)
PROMPT = {"prompt_token_ids": [*PREFIX["prompt_token_ids"], 5]}


def test_a_pinned_prefix_is_written_at_once_and_one_of_a_salt_never(tiny: Path, tmp_path: Path) -> None:
    with LLM(tiny, prefix_dir=tmp_path / "disk") as llm:
        salted = PREFIX | {"cache_salt": "mine"}
        llm.pin(salted)
        for _ in range(3):
            llm.generate(PROMPT | {"cache_salt": "mine"}, GREEDY, False)
        assert llm.engine.store is not None and llm.engine.store.wait(SECONDS) and not len(llm.engine.store)
        llm.pin(PREFIX)
        (expected,) = llm.generate(PROMPT, GREEDY, False)
        assert expected.num_cached_tokens == 0
    assert len(os.listdir(tmp_path / "disk")) == 1
    with LLM(tiny, prefix_dir=tmp_path / "disk") as llm:
        (of_salt,) = llm.generate(PROMPT | {"cache_salt": "mine"}, GREEDY, False)
        (output,) = llm.generate(PROMPT, GREEDY, False)
        assert (of_salt.num_cached_tokens, output.num_cached_tokens) == (0, 300)
        assert output.outputs[0].token_ids == of_salt.outputs[0].token_ids == expected.outputs[0].token_ids
        store = llm.stats().prefix_store
        assert store is not None and store["restored_tokens"] == 300 and store["read_files"] == 1


def test_a_salt_whose_digest_is_named_has_files_that_only_it_reads(tiny: Path, tmp_path: Path) -> None:
    mine, others = (PROMPT | {"cache_salt": salt} for salt in ("my secret salt", "another salt"))
    with LLM(tiny, prefix_dir=tmp_path, prefix_dir_salts=digest_of("my secret salt").upper()) as llm:
        llm.pin(PREFIX | {"cache_salt": "my secret salt"})
        (expected,) = llm.generate(mine, GREEDY, False)
        for _ in range(3):
            llm.generate(others, GREEDY, False)
        assert llm.engine.store is not None and llm.engine.store.wait(SECONDS) and len(llm.engine.store) == 1
    (file,) = tmp_path.iterdir()
    for hidden in ("my secret salt", digest_of("my secret salt")):
        assert hidden.encode() not in file.read_bytes() and hidden not in file.name
    cached = {}
    for salts in (None, [digest_of("another salt")], [digest_of("another salt"), digest_of("my secret salt")]):
        with LLM(tiny, prefix_dir=tmp_path, prefix_dir_salts=salts) as llm:
            outputs = llm.generate([PROMPT, others, mine], GREEDY, False)
            assert all(output.outputs[0].token_ids == expected.outputs[0].token_ids for output in outputs)
            cached[len(salts or ())] = [output.num_cached_tokens for output in outputs]
    assert cached == {0: [0, 0, 0], 1: [0, 0, 0], 2: [0, 0, 300]}


def test_a_prefix_is_written_when_a_second_request_has_used_it(tiny: Path, tmp_path: Path) -> None:
    with LLM(tiny, prefix_dir=tmp_path) as llm:
        store = llm.engine.store
        assert store is not None
        llm.generate(PROMPT, GREEDY, False)
        assert store.wait(SECONDS) and len(store) == 0
        llm.generate(PROMPT, GREEDY, False)
        assert store.wait(SECONDS) and len(store) == 1
        llm.generate(PROMPT, GREEDY, False)  # nothing is written twice
        assert store.wait(SECONDS) and store.stats.written_files == 1


def test_what_only_failed_requests_used_is_not_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny, prefix_dir=tmp_path) as llm:
        forward = llm.engine.runner.forward
        monkeypatch.setattr(llm.engine.runner, "forward", lambda plan: forward(plan)._replace(largest=None))
        monkeypatch.setattr(llm.engine, "_draw", _no_token)
        for _ in range(3):
            (output,) = llm.generate(PROMPT, GREEDY, False, on_error="return")
            assert output.error is not None
        assert llm.engine.store is not None and llm.engine.store.wait(SECONDS) and not os.listdir(tmp_path)


def _no_token(rows: Any, output: Any) -> Any:
    from gossamer.engine.sampling import Sampled

    return Sampled([-1] * len(rows.drawn), [None] * len(rows.drawn))


def test_a_file_is_read_into_little_memory_or_not_at_all(tiny: Path, tmp_path: Path) -> None:
    with LLM(tiny, prefix_dir=tmp_path) as llm:
        llm.pin(PREFIX)
        (expected,) = llm.generate(PROMPT, GREEDY, False)
        per_token = llm.engine.tree.layout.bytes_per_token
    for tokens in (448, 700):  # the slot of a request that shares nothing; room for both
        with LLM(tiny, prefix_dir=tmp_path, memory=tokens * per_token) as llm:
            (output,) = llm.generate(PROMPT, GREEDY, False)
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_keys_of_another_model_or_of_other_settings_are_not_used(
    tiny: Path, tmp_path: Path, make_tiny_llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    with LLM(tiny, prefix_dir=disk) as llm:
        llm.pin(PREFIX)
        llm.generate(PROMPT, GREEDY, False)
    other = make_tiny_llama(tmp_path / "other", initializer_range=0.3, max_position_embeddings=TINY_CONTEXT)
    for path, options in ((other, {}), (tiny, {"quantization": "int8"}), (tiny, {"dtype": "bfloat16"})):
        expected = LLM(path, **options).generate(PROMPT, GREEDY, False)[0]
        caplog.clear()
        with caplog.at_level(logging.INFO, LOGGER), LLM(path, prefix_dir=disk, **options) as llm:
            (output,) = llm.generate(PROMPT, GREEDY, False)
            assert output.num_cached_tokens == 0
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert [record.getMessage() for record in caplog.records] == [
            f"1 prefix files of other models in {disk} are not used"
        ]


def test_a_weight_that_is_edited_in_place_makes_another_model(tiny: Path, tmp_path: Path) -> None:
    model, disk = tmp_path / "model", tmp_path / "disk"
    shutil.copytree(tiny, model)
    with LLM(model, prefix_dir=disk) as llm:
        llm.pin(PREFIX)
        llm.generate(PROMPT, GREEDY, False)
    weights = model / "model.safetensors"
    data, times = bytearray(weights.read_bytes()), weights.stat()
    data[-10] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with LLM(model, prefix_dir=disk) as llm:
        assert llm.generate(PROMPT, GREEDY, False)[0].num_cached_tokens == 0
    with LLM(tiny, prefix_dir=disk) as llm:  # and its copy is the same
        assert llm.generate(PROMPT, GREEDY, False)[0].num_cached_tokens == 300


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="sharing 'off'"):
        EngineOptions(prefix_dir=tmp_path, sharing="off")
    with pytest.raises(ConfigurationError, match="prefix_dir must be"):
        EngineOptions(prefix_dir="")
    with pytest.raises(ConfigurationError):
        EngineOptions(prefix_dir_size="much")
    with pytest.raises(ConfigurationError, match="cannot keep prefixes"):
        make_store(file, new_tree(10))
    assert pack([3]) == (3).to_bytes(4, "little")
