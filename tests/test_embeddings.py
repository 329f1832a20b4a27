"""Embeddings are those of transformers' networks, pooled by hand; and what cannot be embedded is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, LlamaModel, RobertaModel
from typer.testing import CliRunner

from encoders import LONGEST, TEXTS, by_hand, write_bert, write_cross_encoder, write_pooling, write_roberta
from gossamer import LLM
from gossamer.cli.app import app
from gossamer.cli.serve import _specs
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidPromptError,
    PromptTooLongError,
    RequestError,
    UnsupportedModelError,
)
from gossamer.models.pooling_config import read_pooling
from gossamer.models.quiet import quiet_transformers
from gossamer.pooling.model import passes
from gossamer.pooling.texts import Tokens


def cosine(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llm(bert: Path) -> LLM:
    return LLM(bert)


class TestVectors:
    @pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
    @pytest.mark.parametrize("options", [{}, {"runner": "transformers"}], ids=["native", "torch"])
    def test_an_encoder(self, tmp_path: Path, pooling: str, options: dict[str, Any]) -> None:
        directory = write_bert(tmp_path / "bert", pooling)
        for output in LLM(directory, **options).embed(TEXTS, normalize=False):
            expected = by_hand(directory, BertModel, output.prompt_token_ids, pooling)
            np.testing.assert_allclose(output.embedding, expected.numpy(), rtol=1e-4, atol=1e-4)

    def test_positions_that_begin_behind_the_padding(self, tmp_path: Path) -> None:
        directory = write_roberta(tmp_path / "roberta")
        llm = LLM(directory)
        assert llm.max_model_len == 64
        for output in llm.embed(TEXTS, normalize=False):
            expected = by_hand(directory, RobertaModel, output.prompt_token_ids, "mean")
            np.testing.assert_allclose(output.embedding, expected.numpy(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"runner": "transformers"}], ids=["native", "torch"])
    @pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
    def test_a_decoder_that_says_how_it_pools(
        self, make_tiny_llama: Callable[..., Path], tmp_path: Path, pooling: str, options: dict[str, Any]
    ) -> None:
        directory = make_tiny_llama(tmp_path / "llama", initializer_range=0.3)
        write_pooling(directory, pooling, legacy=False, longest=None)
        llm = LLM(directory, **options)
        assert (llm.task, llm.max_model_len) == ("embed", 128)
        for output in llm.embed(TEXTS, normalize=False):
            expected = by_hand(directory, LlamaModel, output.prompt_token_ids, pooling)
            np.testing.assert_allclose(output.embedding, expected.numpy(), rtol=1e-3, atol=1e-3)

    def test_int8_is_near(self, bert: Path, llm: LLM) -> None:
        int8 = LLM(bert, quantization="int8")
        assert (llm.weights, int8.weights) == ("float32", "int8")
        pairs = [
            cosine(one.embedding, other.embedding)
            for one, other in zip(llm.embed(TEXTS), int8.embed(TEXTS), strict=True)
        ]
        assert 0.995 < min(pairs) < 1 - 1e-7  # and they are other numbers

    def test_bfloat16_is_near(self, bert: Path, llm: LLM) -> None:
        half = LLM(bert, dtype="bfloat16")
        assert half.weights == "bfloat16"
        assert cosine(half.embed("a cat")[0].embedding, llm.embed("a cat")[0].embedding) > 0.99

    def test_they_are_the_same_in_any_company(self, llm: LLM) -> None:
        together = llm.embed(TEXTS)
        for text, output in zip(TEXTS, together, strict=True):
            np.testing.assert_allclose(llm.embed(text)[0].embedding, output.embedding, atol=1e-5)

    def test_they_have_length_1_and_can_be_cut(self, llm: LLM) -> None:
        whole, cut = llm.embed("a cat")[0].embedding, llm.embed("a cat", dimensions=5)[0].embedding
        assert len(cut) == 5 and np.linalg.norm(whole) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(cut, whole[:5] / np.linalg.norm(whole[:5]), atol=1e-6)

    def test_token_ids_are_taken_as_they_are(self, llm: LLM) -> None:
        text = llm.embed("a cat")[0]
        ids = llm.embed({"prompt_token_ids": text.prompt_token_ids})[0]
        np.testing.assert_allclose(ids.embedding, text.embedding, atol=1e-6)

    def test_no_prompts_no_vectors(self, llm: LLM) -> None:
        assert llm.embed([]) == []


def test_the_real_model(tmp_path: Path) -> None:
    from gossamer.models import resolve_model

    directory = resolve_model("all-minilm-l6-v2")
    texts = ["A kitten naps.", "The committee raised interest rates by a quarter of a point on Wednesday. " * 4, "b"]
    exact, int8 = LLM("all-minilm-l6-v2"), LLM("all-minilm-l6-v2", quantization="int8")
    assert exact.max_model_len == 256
    for output, rough in zip(exact.embed(texts), int8.embed(texts), strict=True):
        expected = by_hand(directory, BertModel, output.prompt_token_ids, "mean", torch.float32)
        assert cosine(output.embedding, expected) > 0.99999
        assert cosine(rough.embedding, expected) > 0.998
    cat, kitten, bank = (each.embedding for each in exact.embed(["A cat sleeps.", "A kitten naps.", "Rates rose."]))
    assert cat @ kitten > 0.5 > cat @ bank
    ranked = exact.rank("Which animal is it?", ["Rates rose.", "A cat sleeps.", "It rains."], top_n=2)
    assert ranked[0].index == 1 and len(ranked) == 2


class TestRanking:
    def test_by_embeddings(self, llm: LLM) -> None:
        query, *others = (output.embedding for output in llm.embed(["a cat", *TEXTS]))
        ranked = llm.rank("a cat", TEXTS)
        assert ranked[0].index == 0 and ranked[0].relevance_score == pytest.approx(1, abs=1e-5)
        assert sorted(each.index for each in ranked) == list(range(len(TEXTS)))
        for each in ranked:
            assert each.document == TEXTS[each.index]
            assert each.relevance_score == pytest.approx(float(query @ others[each.index]), abs=1e-5)

    @pytest.mark.parametrize("options", [{}, {"runner": "transformers"}], ids=["native", "torch"])
    def test_by_a_cross_encoder(self, tmp_path: Path, options: dict[str, Any]) -> None:
        directory = write_cross_encoder(tmp_path / "cross")
        llm = LLM(directory, **options)
        assert llm.task == "score"
        tokenizer = AutoTokenizer.from_pretrained(directory)
        with quiet_transformers():
            reference = BertForSequenceClassification.from_pretrained(directory).eval()
        with torch.no_grad():
            logits = [reference(**tokenizer("cats", text, return_tensors="pt")).logits[0, 0] for text in TEXTS]
        found = {each.index: each.relevance_score for each in llm.rank("cats", TEXTS)}
        assert [found[i] for i in range(len(TEXTS))] == pytest.approx([float(x.sigmoid()) for x in logits], abs=1e-4)
        assert [each.index for each in llm.rank("cats", TEXTS)] == sorted(found, key=lambda i: -found[i])
        with pytest.raises(UnsupportedModelError, match="use rank"):
            llm.embed("a cat")

    def test_a_pair_is_cut_together(self, tmp_path: Path) -> None:
        llm = LLM(write_cross_encoder(tmp_path / "cross"))
        with pytest.raises(PromptTooLongError, match=r"documents\[1\] has 75 tokens"):
            llm.rank("cats", ["a", "b" * 68])
        assert len(llm.rank("cats", ["a", "b" * 68], truncate_prompt_tokens=-1)) == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompts", "error", "said"),
        [
            (["a", ""], InvalidPromptError, r"prompts\[1\] is empty"),
            (["a", "b" * 39], PromptTooLongError, r"prompts\[1\] has 41 tokens"),
            ([{"prompt_token_ids": []}], InvalidPromptError, r"prompts\[0\] is empty"),
            ([{"prompt_token_ids": [1, 99]}], InvalidPromptError, r"prompts\[0\]\[1\] is 99"),
            ([{"prompt_token_ids": [-1]}], InvalidPromptError, r"prompts\[0\]\[0\] is -1"),
            ([{"prompt_token_ids": [True]}], InvalidPromptError, r"prompts\[0\]\[0\] is True"),
            ([3], InvalidPromptError, r"prompts\[0\] must be a text"),
            ([{}], InvalidPromptError, r"prompts\[0\] must be a text"),
            (["\ud800"], InvalidPromptError, "surrogate"),
        ],
    )
    def test_a_prompt_is_named(self, llm: LLM, prompts: Any, error: type[Exception], said: str) -> None:
        with pytest.raises(error, match=said):
            llm.embed(prompts)

    def test_what_is_too_long_can_be_cut(self, llm: LLM) -> None:
        long = "b" * 200
        assert len(llm.embed(long, truncate_prompt_tokens=-1)[0].prompt_token_ids) == LONGEST
        cut = llm.embed(long, truncate_prompt_tokens=7)[0].prompt_token_ids
        assert len(cut) == 7 and (cut[0], cut[-1]) == (1, 2)  # special tokens stay around it
        assert llm.embed({"prompt_token_ids": [5] * 99}, truncate_prompt_tokens=3)[0].prompt_token_ids == [5] * 3
        for wrong in (0, -2, 41, True, "5"):
            with pytest.raises(RequestError, match="truncate_prompt_tokens"):
                llm.embed("b", truncate_prompt_tokens=wrong)  # type: ignore[arg-type]  # that is what is tested

    @pytest.mark.parametrize("dimensions", [0, -1, 49, 1.5])
    def test_dimensions(self, llm: LLM, dimensions: Any) -> None:
        with pytest.raises(RequestError, match="from 1 to 48"):
            llm.embed("a", dimensions=dimensions)

    def test_an_encoder_generates_nothing(self, bert: Path, llm: LLM) -> None:
        for ask in (lambda: llm.generate("a"), lambda: llm.score("a"), lambda: llm.stats(), lambda: llm.pin("a")):
            with pytest.raises(UnsupportedModelError, match="it makes embeddings"):
                ask()
        with pytest.raises(UnsupportedModelError, match="is an encoder"):
            LLM(bert, task="generate")
        with pytest.raises(UnsupportedModelError, match="no head"):
            LLM(bert, task="score")
        with llm:
            pass

    def test_a_default_that_is_given_changes_nothing(self, bert: Path) -> None:
        assert LLM(bert, memory="4GB", kv_dtype="auto", sharing="attention").task == "embed"

    def test_one_cannot_talk_to_it(self, bert: Path, tmp_path: Path) -> None:
        for model, said in ((bert, "it makes embeddings"), (write_cross_encoder(tmp_path), "it scores pairs")):
            result = CliRunner().invoke(app, ["chat", str(model)], input="Hi")
            assert isinstance(result.exception, UnsupportedModelError) and said in str(result.exception)
            assert "Loading" not in result.output  # it is said before that

    def test_a_server_of_several_models_gives_each_the_options_that_concern_it(
        self, bert: Path, make_tiny_llama: Callable[..., Path], tmp_path: Path
    ) -> None:
        llama = str(make_tiny_llama(tmp_path / "llama"))
        options = {"kv_dtype": "int8", "dtype": "bfloat16"}
        specs = _specs([llama, str(bert)], {"memory": 1 << 20}, options, None)
        loads: list[Any] = [spec.load for spec in specs.values()]
        assert [load.args[1] for load in loads] == [{"memory": 1 << 20} | options, {"dtype": "bfloat16"}]
        assert [spec.cache_bytes for spec in specs.values()] == [1 << 20, 0]
        with pytest.raises(ConfigurationError, match="kv_dtype: without"):
            _specs([str(bert)], {}, options, None)

    def test_a_generating_model_embeds_only_if_asked_to(self, make_tiny_llama: Callable[..., Path], tmp_path: Path):
        directory = make_tiny_llama(tmp_path / "llama")
        llm = LLM(directory)
        for ask in (lambda: llm.embed("a"), lambda: llm.rank("a", ["b"])):
            with pytest.raises(UnsupportedModelError, match="--task embed"):
                ask()
        asked = LLM(directory, task="embed")
        output = asked.embed("a cat", normalize=False)[0]
        expected = by_hand(directory, LlamaModel, output.prompt_token_ids, "lasttoken")
        np.testing.assert_allclose(output.embedding, expected.numpy(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"dtype": "float16"}, "float16"),
            ({"weights": "as-stored"}, "as-stored"),
            ({"max_model_len": 65}, "64 tokens"),
            ({"task": "classify"}, "task must be"),
            ({"kv_dtype": "int8", "sharing": "storage"}, "kv_dtype, sharing: without an effect"),
            ({"prefix_dir": "somewhere", "batch_invariant": True}, "batch_invariant, prefix_dir: without"),
            ({"memory": "1GB"}, "memory: without an effect on a model of embeddings"),
            ({"int8_head": True, "quantization": "int8"}, "int8_head: without"),
            ({"lora": {"sql": "adapters/sql"}}, "adapters are for models that generate text"),
        ],
    )
    def test_options_without_a_meaning(self, bert: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            LLM(bert, **options)

    def test_the_positions_beyond_what_is_advised(self, bert: Path) -> None:
        assert len(LLM(bert, max_model_len=64).embed("b" * 60)[0].prompt_token_ids) == 62


class TestFiles:
    def read(self, directory: Path) -> Any:
        from gossamer.models.load import load_config, load_tokenizer

        return read_pooling(directory, load_config(directory), load_tokenizer(directory))

    @pytest.mark.parametrize(
        ("file", "content", "error", "said"),
        [
            ("modules.json", "[{]", CheckpointError, "cannot be read"),
            ("modules.json", '{"a": 1}', CheckpointError, "list of steps"),
            ("modules.json", '[{"type": "x.Pooling", "path": "../.."}]', CheckpointError, "name of a folder"),
            ("modules.json", '[{"type": "x.Pooling", "path": "/etc"}]', CheckpointError, "name of a folder"),
            ("modules.json", '[{"type": "x.Pooling", "path": 3}]', CheckpointError, "list of steps"),
            ("modules.json", '[{"type": "x.Dense", "path": "2_Dense"}]', UnsupportedModelError, "Dense is not known"),
            ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', UnsupportedModelError, "weightedmean"),
            ("1_Pooling/config.json", '{"pooling_mode": ["mean", "cls"]}', UnsupportedModelError, "one at a time"),
            ("1_Pooling/config.json", "{}", UnsupportedModelError, r"pools by \[\]"),
            ("sentence_bert_config.json", '{"max_seq_length": "9"}', CheckpointError, "max_seq_length"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, tmp_path: Path, file: str, content: str, error: type[Exception], said: str
    ) -> None:
        directory = write_bert(tmp_path / "bert")
        (directory / file).write_text(content)
        with pytest.raises(error, match=said):
            self.read(directory)

    def test_lower_case(self, tmp_path: Path) -> None:
        directory = write_bert(tmp_path / "bert")
        (directory / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
        llm = LLM(directory)
        assert llm.embed("A Cat")[0].prompt_token_ids == llm.embed("a cat")[0].prompt_token_ids
        assert llm.max_model_len == 64


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 64))
def test_passes_hold_every_input_once_in_groups_of_one_length(lengths: list[int], most: int) -> None:
    inputs = [Tokens([0] * length) for length in lengths]
    found = list(passes(inputs, most))
    assert sorted(place for each in found for group in each for place in group) == list(range(len(inputs)))
    for each in found:
        assert all(len({lengths[place] for place in group}) == 1 for group in each)
        sizes = [lengths[place] for group in each for place in group]
        assert sum(sizes) <= most or len(sizes) == 1
