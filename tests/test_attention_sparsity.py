"""The sparsity of a model's attention: of the queries and keys that it uses, and by command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

from architectures import VOCAB, make_model
from gossamer.cli.app import app
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.models.encoder import load_encoder
from gossamer.operators.gaussian.assumption import attention_points
from gossamer.report.attention_page import render
from gossamer.report.attention_sparsity import measure_attention, text_tokens
from html_page import Page
from sparsity_references import check, dense

# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "granite"])
def test_decoder_heads_are_seen_as_attention_uses_them(name: str) -> None:
    """Against queries and keys that are rotated here, of every layer; the model computes with a mask as usual."""
    model, ids = make_model(name), torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    report = measure_attention(model, ids, prefixes=3, progress=seen.append)
    assert model.config._attn_implementation == "eager"
    assert report.prefixes == (14, 27, 40) and seen == list(range(1, 9))
    projected: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda _, args, out, path=path: projected.update({path: out}))
    model(input_ids=ids[None])
    rotation = model.model.rotary_emb(ids[None].float(), torch.arange(40)[None])
    for each in report.heads:
        q, k = (
            projected[f"model.layers.{each.layer}.self_attn.{part}"].unflatten(-1, (-1, 12)).transpose(1, 2)
            for part in ("q_proj", "k_proj")
        )
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        scale = 0.3 if name == "granite" else 12**-0.5
        matrix = dense(*attention_points(q[0, each.head], k[0, each.head // 2], scale))
        for prefix in each.report.prefixes:
            check(prefix, matrix[: prefix.n, : prefix.n], rel=1e-3)
    assert report.largest.report.largest.ratio == max(h.report.largest.ratio for h in report.heads)


def tiny_bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.3, **sizes)
    return BertModel(config).eval().requires_grad_(False)


def test_encoder_heads_have_the_support_of_their_attention() -> None:
    """Rows of attention add up to 1, so that the effective support is 1 / sum of squares."""
    model, ids = tiny_bert(), torch.arange(30)
    report = measure_attention(model, ids)
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids[None], output_attentions=True).attentions
    for each in report.heads:
        support = 1 / weights[each.layer][0, each.head].double().square().sum(-1)
        assert each.report.effective_support == pytest.approx(float(support.mean()), rel=1e-4)
    assert len(report.heads) == 8 and report.prefixes == tuple(range(1, 31))


@pytest.mark.parametrize(("name", "what"), [("gemma2", "caps"), ("gpt_oss", "sinks")])
def test_other_attention_is_refused(name: str, what: str) -> None:
    model = make_model(name)
    with pytest.raises(UnsupportedModelError, match=what):
        measure_attention(model, torch.arange(8))
    assert model.config._attn_implementation == "eager"


def test_bad_texts_and_models() -> None:
    model = make_model("llama")
    with pytest.raises(ConfigurationError, match="0 tokens"):
        measure_attention(model, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="got 0"):
        measure_attention(model, torch.arange(8), prefixes=0)
    model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(GossamerError, match="layer 1 are not finite"):
        measure_attention(model, torch.arange(8))


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments), "--attention"])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "brown", "fox", "dog", "over", "."]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(directory)
    return directory


def test_command_on_a_decoder(tiny: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = json.loads(invoke(tiny, "--text", text, "--length", 40, "--json", "--html", page).stdout)
    assert found["tokens"] == 40 and found["prefixes"] == list(range(1, 41)) and len(found["heads"]) == 8
    for head in found["heads"]:
        assert head["largest_ratio"] == max(head["by_prefix"]["ratio"]) >= head["ratio"]
        assert head["by_prefix"]["ratio"][head["largest_ratio_at"] - 1] == head["largest_ratio"]
        assert 1 <= head["effective_support"] <= 40
    assert found["largest_ratio"] == max(head["largest_ratio"] for head in found["heads"])
    shown = Page(page.read_text())
    assert shown.links == ["https://arxiv.org/abs/2507.23539"] and "effective support" in shown.text
    assert page.read_text().count("<tr>") == 9


def test_command_as_a_table(bert: Path, text: Path) -> None:
    shown = invoke(bert, "--text", text, "--length", 20).stdout
    assert "20 tokens, 8 heads" in shown and "effective support" in shown and "The largest ratio" in shown


def test_page_quotes_what_it_is_told() -> None:
    report = measure_attention(tiny_bert(), torch.arange(10))
    source = render(report, model="<b>&model", text="a & b")
    assert "<b>&model" in Page(source).text and "<b>&model" not in source
    Page(render(measure_attention(tiny_bert(), torch.arange(1)), model="m", text="one token"))


def test_encoder_texts_have_their_special_tokens(bert: Path) -> None:
    _, tokenizer = load_encoder(bert)
    assert text_tokens(tokenizer, "the quick dog", 4, encoder=True).tolist() == [2, 5, 6, 3]
    for length, message in ((6, "5 tokens, not 6"), (2, "at least 3 tokens")):
        with pytest.raises(ConfigurationError, match=message):
            text_tokens(tokenizer, "the quick dog", length, encoder=True)


def test_encoders_are_checked(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float64"):
        load_encoder(bert, "float64")
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lack"):
        load_encoder(tmp_path)


def test_command_on_the_default_model(smollm2_path: Path, text: Path) -> None:
    found = json.loads(invoke("smollm2-135m", "--text", text, "--length", 16, "--json").stdout)
    assert len(found["heads"]) == 30 * 9 and found["tokens"] == 16
    assert all(0 <= head["ratio"] <= 15 for head in found["heads"])
    assert 1 < found["largest_ratio"] < 15
