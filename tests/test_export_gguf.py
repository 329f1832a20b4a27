"""GGUF files are read back by the gguf package and by transformers: same weights, same settings, same tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges

from gossamer.compress.export import export
from gossamer.compress.gguf_tokenizer import Vocabulary, describe
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models import resolve_model
from gossamer.models.quiet import quiet_transformers
from gossamer.texts import reference_text
from native_checkpoints import (
    LLAMA3_ROPE,
    VOCAB,
    byte_level,
    dequantized_model,
    dequantized_tensors,
    divergence,
    save_model,
    write_native,
)

ARCHITECTURES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.text("ab \n12'", max_size=40)


def export_model(name: str, directory: Path, **changes: Any) -> tuple[Path, Path]:
    """A native directory and the GGUF file made from it."""
    native = write_native(save_model(name, directory / "model", **changes), directory / "int8")
    return native, export(native, directory / "model.gguf", "gguf").path


def read_model(file: Path) -> Any:
    with quiet_transformers():
        return hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def read_tokenizer(file: Path) -> Any:
    with quiet_transformers():
        return hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


# --- weights and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reads_the_same_model(name, tmp_path):
    native, file = export_model(name, tmp_path)
    expected, found = dequantized_model(native), read_model(file)
    for parameter, weight in expected.state_dict().items():
        bound = 1e-6
        if weight.dim() == 2:
            largest = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            bound = largest / 127 * 0.51 + largest * 2**-11  # half a step, and the rounding of the step to 16 bit
        assert ((found.state_dict()[parameter] - weight).abs() <= bound).all(), parameter
    for setting in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(found.config, setting) == pytest.approx(getattr(expected.config, setting)), setting
    if name == "llama3":  # transformers does not read these factors; llama.cpp does
        found.config.rope_parameters = LLAMA3_ROPE
        found.model.rotary_emb = type(found.model.rotary_emb)(found.config)
    ids = torch.randint(0, VOCAB, (1, 50))
    with torch.no_grad():
        reference = expected(ids).logits
        assert divergence(reference, found(ids).logits) < 0.01 * divergence(reference, reference.roll(1, dims=1))


def test_biases_are_there_and_turn_with_the_rows_they_belong_to(tmp_path):
    native, file = export_model("llama_biases", tmp_path)
    expected = dequantized_tensors(native)
    found = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(file).tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    for gguf_name, name in (names | {"ffn_up": "mlp.up_proj"}).items():
        bias, weight = (expected[f"model.layers.1.{name}.{last}"] for last in ("bias", "weight"))
        if gguf_name in ("attn_q", "attn_k"):  # rows i and i + 16 of a head of 32 become neighbours
            order = [32 * head + i + half for head in range(len(bias) // 32) for i in range(16) for half in (0, 16)]
            bias, weight = bias[order], weight[order]
        assert torch.equal(found[f"blk.1.{gguf_name}.bias"], bias)
        torch.testing.assert_close(found[f"blk.1.{gguf_name}.weight"], weight, atol=0.005, rtol=0)


def test_the_llama3_factors_are_the_ones_transformers_applies(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    native, file = export_model("llama3", tmp_path)
    factors = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    config = dequantized_model(native).config
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(factors.data), LlamaRotaryEmbedding(config).inv_freq)
    assert len(set(factors.data.tolist())) > 2


def test_rows_that_are_no_multiple_of_32_are_f16(tmp_path):
    native = write_native(save_model("llama", tmp_path / "model", intermediate_size=72), tmp_path / "int8")
    report = export(native, tmp_path / "model.gguf", "gguf")
    expected = dequantized_tensors(native)
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(report.path).tensors}
    halves = {name for name, kind in kinds.items() if kind == GGMLQuantizationType.F16}
    assert halves == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert any("2 tensors" in warning and "F16" in warning for warning in report.warnings)
    found = read_model(report.path).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, expected["model.layers.0.mlp.down_proj.weight"].half().float())


def test_exact_outlier_columns_are_used(tmp_path):
    source = save_model("llama", tmp_path / "model")
    native = write_native(source, tmp_path / "int8", outlier_columns=64)  # all columns of the layers of width 64
    export(native, tmp_path / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    found = torch.from_numpy(dequantize(tensors["blk.0.ffn_up.weight"].data, GGMLQuantizationType.Q8_0))
    with quiet_transformers():
        exact = hf.AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.up_proj.weight
    codes_only = dequantized_tensors(write_native(source, tmp_path / "plain"))["model.layers.0.mlp.up_proj.weight"]
    assert (found - exact).abs().mean() < (codes_only - exact).abs().mean()


def test_a_tied_head_is_left_out_and_an_own_one_is_there(tmp_path):
    for tied in (True, False):
        (tmp_path / str(tied)).mkdir()
        _, file = export_model("llama", tmp_path / str(tied), tie_word_embeddings=tied)
        assert ("output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}) == (not tied)


def test_linear_rope_scaling_is_said(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
    _, file = export_model("llama", tmp_path, rope_parameters=rope)
    found = metadata(file)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert found["llama.rope.freq_base"] == 20000.0


def test_a_window_that_readers_ignore_is_said(tmp_path):
    native = write_native(save_model("mistral", tmp_path / "model", sliding_window=32), tmp_path / "int8")
    assert any("beyond 32 tokens" in warning for warning in export(native, tmp_path / "m.gguf", "gguf").warnings)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "these can: llama, mistral, qwen2, qwen3, gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": YARN}, "its RoPE type is yarn"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "its RoPE type is llama3"),
        ("qwen3", {"attention_bias": True}, r"q_proj\.bias has no place"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "take turns"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "scales its queries by 100"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "caps its logits"),
        ("gemma3", {"rope_local_base_freq": 5000.0}, "RoPE of its sliding layers"),
    ],
)
def test_what_gguf_cannot_say_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(UnsupportedModelError, match=reason):
        export_model(name, tmp_path, **changes)
    assert not (tmp_path / "model.gguf").exists()


def test_a_missing_tensor_is_named(tmp_path):
    native, _ = export_model("llama", tmp_path)
    config = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is missing"):
        export(native, tmp_path / "other.gguf", "gguf")
    (native / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 8}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[400, 64\]; the model needs \[408, 64\]"):
        export(native, tmp_path / "other.gguf", "gguf")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def as_transformers(tokenizer: Tokenizer) -> Any:
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(*, metaspace: bool = False, prefix: bool = False) -> Any:
    """SentencePiece's BPE as transformers converts it: byte fallback, and merges in the order of the vocabulary."""
    pieces = {token.replace("Ġ", "▁") for token in byte_level().get_vocab() if token.isascii() or "Ġ" in token}
    pieces = {piece for piece in pieces if not piece.startswith("<") and piece}
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ordered = special + sorted(pieces, key=lambda piece: (len(piece) == 1, len(piece), piece))
    vocabulary = {piece: number for number, piece in enumerate(ordered)}
    merges = generate_merges(vocabulary, {piece: -number for piece, number in vocabulary.items() if number >= 259})
    cls = hf.LlamaTokenizer if metaspace else hf.GemmaTokenizer
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    more = {"add_prefix_space": prefix} if metaspace else {"pad_token": "</s>", "mask_token": "<unk>"}
    return cls(vocab=vocabulary, merges=merges, **names, **more)


class ScoreEncoder:
    """What llama.cpp does with a vocabulary of the kind ``llama``, without special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        self.scores = vocabulary.scores or []

    def __call__(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            joints = [(self.ids.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
            possible = [(-self.scores[number], i) for number, i in joints if number is not None]
            if not possible:
                break
            _, i = min(possible)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [number for symbol in symbols for number in self._ids(symbol)]

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (((), None), "gpt-2"),
        ((("Digits",), None), "smollm"),
        (((), LLAMA3_WORDS), "llama-bpe"),
        (((), QWEN2_WORDS), "qwen2"),
    ],
)
def test_the_pre_tokenizer_is_found_by_its_structure(arguments, expected):
    first, words = arguments
    vocabulary = describe(byte_level(*first, words=words), VOCAB)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", expected)
    assert len(vocabulary.tokens) == VOCAB
    assert vocabulary.types.count(5) == 10  # ids without a token


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_transformers_tokenizes_alike_from_a_byte_level_file(name, text, byte_level_files):
    ours, theirs = byte_level_files[name]
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


@pytest.fixture(scope="module")
def byte_level_files(tmp_path_factory):
    """For a model type: the tokenizer of the native directory, and the one that is read from its GGUF file."""
    files = {}
    for name in ("llama", "qwen2"):
        native, file = export_model(name, tmp_path_factory.mktemp(name))
        files[name] = hf.AutoTokenizer.from_pretrained(native), read_tokenizer(file)
    # Readers do not compose characters, which is said in a warning.
    files["qwen2"][0].backend_tokenizer.normalizer = normalizers.Sequence([])
    return files


@pytest.mark.parametrize(("metaspace", "prefix"), [(False, False), (True, False), (True, True)])
def test_sentencepiece_is_described_by_scores(metaspace, prefix):
    tokenizer = sentencepiece(metaspace=metaspace, prefix=prefix)
    vocabulary = describe(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.space_prefix) == ("llama", prefix)
    assert [int(kind) for kind in vocabulary.types[:5]] == [2, 3, 3, 6, 6]
    for text in ("the statement is a string", "x", "12 ñ 🙂\n\n", reference_text()[60_000:60_400]):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ScoreEncoder(vocabulary)(" " * prefix + text) == expected


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_highest_score_is_merged_where_the_first_merge_would_be(text):
    tokenizer = sentencepiece()
    literal = text.replace("<", "(")  # special tokens are found before any merging, by readers as well
    encode = ScoreEncoder(describe(tokenizer, len(tokenizer)))
    assert encode(literal) == tokenizer(literal, add_special_tokens=False)["input_ids"]


def test_transformers_tokenizes_alike_from_a_sentencepiece_file(tmp_path):
    tokenizer = sentencepiece()
    model = save_model("gemma3", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    native = write_native(model, tmp_path / "int8")
    for path in model.glob("*.jinja"):
        (native / path.name).write_text(path.read_text())
    again = read_tokenizer(export(native, tmp_path / "model.gguf", "gguf").path)
    text = reference_text()[:20_000] + "  two  ñandú 🙂\n\n\tx"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def with_pre_tokenizer(step: Any) -> Any:
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = step
    return as_transformers(tokenizer)


def with_model(**changes: object) -> Any:
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"] |= changes
    return as_transformers(Tokenizer.from_str(json.dumps(state)))


def with_merges(change: Any) -> Any:
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    change(state["model"]["merges"])
    return as_transformers(Tokenizer.from_str(json.dumps(state)))


def part_pairs_of_one_piece(merges: list[list[str]]) -> None:
    place = next(i for i, (one, other) in enumerate(itertools.pairwise(merges)) if "".join(one) == "".join(other))
    merges.append(merges.pop(place))


def with_normalizer(tokenizer: Any, normalizer: Any) -> Any:
    again = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    again.normalizer = normalizer
    return as_transformers(again)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: byte_level(words=r"\w+"), "has no name in GGUF"),
        (lambda: with_pre_tokenizer(pre_tokenizers.Whitespace()), "its pre-tokenizer is Whitespace"),
        (lambda: with_pre_tokenizer(None), "absent"),
        (lambda: with_pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a space before the text"),
        (lambda: with_model(ignore_merges=True), "ignore_merges"),
        (lambda: with_model(merges=[]), "no merges"),
        (lambda: with_normalizer(byte_level(), normalizers.Lowercase()), "its normalizer is Lowercase"),
        (lambda: with_normalizer(sentencepiece(), normalizers.Lowercase()), "its normalizer is"),
        (lambda: with_normalizer(sentencepiece(), None), "its pre-tokenizer is"),
        (lambda: with_merges(lambda merges: merges.pop(5)), "never merges"),
        (lambda: with_merges(part_pairs_of_one_piece), "do not follow an order"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_describe_is_refused(make, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(make(), 10**4)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused():
    with pytest.raises(CheckpointError, match="the id 389, but the model has only 300"):
        describe(byte_level(), 300)


def test_special_tokens_without_an_embedding_are_left_out_and_said():
    tokenizer = as_transformers(Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = describe(tokenizer, 390)
    assert vocabulary.tokens == describe(byte_level(), 390).tokens
    assert any("<image>" in warning for warning in vocabulary.warnings)


# --- real models -----------------------------------------------------------------------------------------------------


def test_a_real_byte_level_tokenizer_is_described(smollm2_path):
    smollm2 = hf.AutoTokenizer.from_pretrained(smollm2_path)
    vocabulary = describe(smollm2, len(smollm2))
    assert (vocabulary.model, vocabulary.pre, len(vocabulary.merges or ())) == ("gpt2", "gpt-2", 48_900)
    assert vocabulary.warnings == []


@pytest.mark.slow
def test_a_real_sentencepiece_tokenizer_is_described():
    gemma3 = hf.AutoTokenizer.from_pretrained(resolve_model("gemma3-270m"))
    vocabulary = describe(gemma3, len(gemma3))
    assert (vocabulary.model, vocabulary.space_prefix) == ("llama", False)
    encode = ScoreEncoder(vocabulary)
    for line in [line for line in reference_text().splitlines() if line][:500]:
        assert encode(line) == gemma3(line, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_real_model_survives(name, tmp_path):
    native = write_native(resolve_model(name), tmp_path / "int8")
    file = export(native, tmp_path / "model.gguf", "gguf").path
    ours, theirs = hf.AutoTokenizer.from_pretrained(native), read_tokenizer(file)
    text = reference_text() + "  two  ñandú 中文 🙂\n\n\tx 12345"
    ids = ours(text)["input_ids"]
    assert theirs(text)["input_ids"] == ids
    assert theirs.chat_template == ours.chat_template
    window = torch.tensor([ids[:512]])
    with torch.no_grad():
        reference = dequantized_model(native)(window).logits
        assert divergence(reference, read_model(file)(window).logits) < 0.003
