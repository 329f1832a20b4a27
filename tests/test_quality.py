"""The quality tool: windows with exact counts, figures that equal their definitions, intervals that mean something."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

import gossamer.report.quality as quality_module
from architectures import make_model
from forked import run_program
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models.load import load_model
from gossamer.report.quality import Evaluation, bootstrap_intervals, evaluate
from gossamer.texts import reference_text, token_windows

VOCABULARY = 7


class Planned:
    """A model that answers with logits made beforehand, whatever the tokens before."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(
            get_text_config=lambda decoder: SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=64)
        )

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(VOCABULARY, 1))

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[None, : input_ids.shape[1]])


def planned(seed: int, length: int, dtype: torch.dtype = torch.float32) -> Planned:
    generator = torch.Generator().manual_seed(seed)
    return Planned((4 * torch.randn(length, VOCABULARY, generator=generator)).to(dtype))


def by_definition(model: Planned, reference: Planned, window: torch.Tensor) -> tuple[float, float, float, float]:
    """Mean NLL of both, mean KL and agreement of one window: scalar loops in fp64, as the formulas are written."""
    p, q = (m.logits.double().softmax(-1)[: len(window) - 1].tolist() for m in (model, reference))
    targets = window[1:].tolist()
    count = len(targets)
    nll = -sum(math.log(row[t]) for row, t in zip(p, targets, strict=True)) / count
    reference_nll = -sum(math.log(row[t]) for row, t in zip(q, targets, strict=True)) / count
    kl = (
        sum(b * math.log(b / a) for rows in zip(p, q, strict=True) for a, b in zip(*rows, strict=True) if b > 0) / count
    )
    agree = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(p, q, strict=True)) / count
    return nll, reference_nll, kl, agree


# --- figures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk=st.sampled_from([1, 3 * VOCABULARY, 1 << 22]),
)
def test_figures_equal_their_definitions(seed: int, lengths: list[int], dtype: torch.dtype, chunk: int) -> None:
    model, reference = planned(seed, 20, dtype), planned(seed + 1, 20)
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_module, "CHUNK", chunk)
        found = evaluate(model, windows, reference, resamples=10)
    each = [by_definition(model, reference, window) for window in windows]
    counts = [length - 1 for length in lengths]
    nll, reference_nll, kl, agree = (
        sum(figure * count for figure, count in zip(column, counts, strict=True)) / sum(counts)
        for column in zip(*each, strict=True)
    )
    assert (found.windows, found.tokens) == (len(lengths), sum(counts))
    assert found.nll == pytest.approx([figures[0] for figures in each], rel=1e-5, abs=1e-5)
    assert found.reference_nll == pytest.approx([figures[1] for figures in each], rel=1e-5, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(reference_nll), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(nll - reference_nll), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert found.top1_agreement == pytest.approx(agree)


def test_a_model_does_not_differ_from_itself() -> None:
    model = make_model("llama")
    found = evaluate(model, list(torch.randint(199, (3, 20))), model)
    assert (found.perplexity_ratio, found.kl, found.top1_agreement) == (1.0, 0.0, 1.0)
    assert (found.perplexity_ratio_interval, found.kl_interval) == ((1.0, 1.0), (0.0, 0.0))
    assert found.perplexity == found.reference_perplexity


def test_perplexity_is_that_of_transformers() -> None:
    model = make_model("gemma2")
    window = torch.randint(199, (30,))
    loss = model(input_ids=window[None], labels=window[None]).loss
    assert evaluate(model, [window]).perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_tokens_that_the_reference_excludes_do_not_count() -> None:
    reference = planned(0, 4)
    reference.logits[:, 3] = -math.inf
    model = Planned(reference.logits.clone())
    window = torch.tensor([0, 1, 2, 4])
    assert evaluate(model, [window], reference).kl == 0
    model.logits[:, 3] = 0.0  # the model gives the token a chance that the reference does not
    kl = evaluate(model, [window], reference).kl
    assert kl is not None and 0 < kl < math.inf


def test_progress_and_memory_of_no_reference() -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(planned(0, 9), [torch.arange(5)] * 3, progress=lambda *state: seen.append(state))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.kl is None and found.reference_perplexity is None
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == 12


# --- intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.ones(40, dtype=torch.float64)
    covered = 0
    for seed in range(200):
        sums = 3 + torch.randn(1, 40, dtype=torch.float64, generator=generator)
        (interval,) = bootstrap_intervals(sums, tokens, resamples=400, seed=seed)
        assert interval is not None
        covered += interval[0] <= 3 <= interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """Windows of very different difficulty, a reference that is better by the same amount on each."""
    generator = torch.Generator().manual_seed(1)
    own, ours, theirs = torch.zeros(12, VOCABULARY), [], []
    for difficulty in torch.linspace(0, 4, 10):
        own = torch.randn(12, VOCABULARY, generator=generator) * difficulty
        ours.append(own)
        theirs.append(own * 1.01)
    evaluation = Evaluation(model := Planned(own), reference := Planned(own))
    for model.logits, reference.logits in zip(ours, theirs, strict=True):
        evaluation.add(torch.randint(VOCABULARY, (12,), generator=generator))
    found = evaluation.quality()
    assert found.perplexity_interval is not None and found.perplexity_ratio_interval is not None
    width = math.log(found.perplexity_interval[1] / found.perplexity_interval[0])
    paired = math.log(found.perplexity_ratio_interval[1] / found.perplexity_ratio_interval[0])
    assert paired < width / 20


def test_intervals_depend_on_the_seed_only() -> None:
    windows = list(torch.randint(VOCABULARY, (6, 9)))
    first, again, other = (evaluate(planned(0, 9), windows, seed=seed).perplexity_interval for seed in (0, 0, 1))
    assert first == again != other


def test_one_window_has_no_interval() -> None:
    found = evaluate(planned(0, 9), [torch.arange(5)], planned(1, 9))
    assert found.perplexity_interval is None and found.kl_interval is None and found.kl is not None


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (torch.tensor([1]), "at least 2"),
        (torch.zeros(65, dtype=torch.int64), "context is 64"),
        (torch.tensor([0, 7]), "token id 7"),
        (torch.tensor([0, -1]), "token id -1"),
        (torch.tensor([0.0, 1.0]), "integer"),
        (torch.zeros(1, 5, dtype=torch.int64), "shape"),
    ],
)
def test_a_window_that_cannot_be_evaluated(window: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        evaluate(planned(0, 65), [window])


def test_no_windows_no_resamples_other_vocabulary() -> None:
    with pytest.raises(ConfigurationError, match="no windows"):
        evaluate(planned(0, 9), [])
    with pytest.raises(ConfigurationError, match="resamples"):
        evaluate(planned(0, 9), [torch.arange(5)] * 2, resamples=0)
    with pytest.raises(ConfigurationError, match="7 tokens and the reference's 199"):
        evaluate(planned(0, 9), [torch.arange(5)], make_model("llama"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    model = planned(0, 9)
    model.logits[2, 2] = value
    with pytest.raises(GossamerError, match="window 1 are not finite"):
        evaluate(model, [torch.arange(3), torch.arange(5)])


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def beginning_tokenizer(tiny: Path) -> Any:
    """It puts a token before every text, as Gemma's does."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return tokenizer


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(st.characters(codec="ascii"), min_size=30, max_size=200),
    window=st.integers(2, 20),
    count=st.integers(1, 9),
)
def test_windows_are_the_text_cut_up(
    tokenizer: Any, beginning_tokenizer: Any, text: str, window: int, count: int
) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for each, first in ((tokenizer, []), (beginning_tokenizer, [0])):
        windows = token_windows(each, text, window, count)
        own = window - len(first)
        assert len(windows) == min(count, len(ids) // own)
        assert all(w.dtype == torch.int64 and w.shape == (window,) for w in windows)
        assert all(w[: len(first)].tolist() == first for w in windows)
        assert torch.cat([w[len(first) :] for w in windows]).tolist() == ids[: len(windows) * own]


def test_all_windows_of_the_text_by_default(tokenizer: Any) -> None:
    assert len(token_windows(tokenizer, "x" * 35, 10)) == 3


@pytest.mark.parametrize(
    ("text", "window", "count", "message"),
    [
        ("", 10, None, "the text has 0 tokens, and a window of 10 needs 10"),
        ("abc", 10, 4, "the text has 3 tokens"),
        ("abc", 1, None, "at least 2"),
        ("abc", 2, 0, "at least 1"),
    ],
)
def test_too_little_text(tokenizer: Any, text: str, window: int, count: int | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        token_windows(tokenizer, text, window, count)


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(reference_text()[:700])
    return path


def test_command_prints_what_evaluate_finds(tiny: Path, text: Path) -> None:
    arguments = (tiny, "--text", text, "--window", 50, "--reference", tiny, "--dtype", "bfloat16")
    result = json.loads(invoke(*arguments, "--json").stdout)
    model, tokenizer = load_model(tiny, dtype="bfloat16")
    expected = evaluate(model, token_windows(tokenizer, text.read_text(), 50), load_model(tiny)[0])
    assert result["windows"] == 14 and result["tokens"] == 14 * 49 and not result["interrupted"]
    for name, value in json.loads(json.dumps(expected.to_dict())).items():
        assert result[name] == pytest.approx(value), name
    shown = invoke(*arguments).stdout
    assert f"{expected.perplexity:.3f}" in shown and f"{expected.kl:.5f}" in shown


def test_fewer_windows_than_asked_for_is_said(tiny: Path, text: Path) -> None:
    result = invoke(tiny, "--text", text, "--window", 50, "--windows", 99, "--json")
    assert "14 windows of 50 tokens, not 99" in result.stderr
    assert json.loads(result.stdout)["windows"] == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "/no/such/file"], "cannot read /no/such/file"),
        (["--text", "{latin}"], "not UTF-8: byte 3"),
        (["--text", "{empty}"], "the text has 0 tokens, and a window of 1024 needs 1024"),
        (["--window", "129"], "context is 128"),
        (["--window", "64", "--windows", "1", "--reference", "{other}"], "split the text differently"),
    ],
)
def test_bad_input_is_a_typed_error(
    tiny: Path, make_tiny_llama: Callable[..., Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    latin, empty, other = tmp_path / "latin", tmp_path / "empty", tmp_path / "other"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    empty.write_text("")
    if "{other}" in arguments:
        make_tiny_llama(other)
        # the same size of vocabulary, other tokens
        fields = json.loads((other / "tokenizer.json").read_text())
        vocabulary = fields["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        (other / "tokenizer.json").write_text(json.dumps(fields))
    result = invoke(tiny, *(a.format(latin=latin, empty=empty, other=other) for a in arguments))
    assert isinstance(result.exception, ConfigurationError) and message in str(result.exception)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reports_the_windows_that_are_done(tiny: Path, text: Path) -> None:
    """A real signal in a real process; the third window sends it."""
    script = (
        "import os, signal, gossamer.report.quality as q\n"
        "add = q.Evaluation.add\n"
        "def interrupted(self, window):\n"
        "    if self.windows == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    add(self, window)\n"
        "q.Evaluation.add = interrupted\n"
        "from gossamer.cli.app import main; main()\n"
    )
    result = run_program(script, "eval", tiny, "--text", text, "--window", 50, "--json")
    assert result.returncode == 128 + signal.SIGINT
    report = json.loads(result.stdout)
    assert report["interrupted"] and report["windows"] == 2 and report["tokens"] == 98
    assert "Stopped after 2 of 14 windows" in result.stderr


# --- a real model ----------------------------------------------------------------------------------------------------


def test_smollm2_on_the_language_reference(smollm2_path: Path) -> None:
    model, tokenizer = load_model(smollm2_path, dtype="float32")
    (window,) = token_windows(tokenizer, reference_text(), 256, 1)
    assert evaluate(model, [window]).perplexity == pytest.approx(17.2350, rel=1e-4)


@pytest.mark.slow
def test_smollm2_has_the_perplexity_it_had_before(smollm2_path: Path) -> None:
    """The figure that quantization is measured against: 16 windows of 1024 tokens."""
    model, tokenizer = load_model(smollm2_path, dtype="float32")
    found = evaluate(model, token_windows(tokenizer, reference_text(), 1024, 16))
    assert found.tokens == 16 * 1023
    assert found.perplexity == pytest.approx(12.8815, rel=1e-4)
