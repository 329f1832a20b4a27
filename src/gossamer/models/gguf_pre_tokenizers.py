"""How byte-level tokenizers of GGUF files cut text into words, by the name in the file (``tokenizer.ggml.pre``).

A file holds that name only; the expressions are built into llama.cpp (``src/llama-vocab.cpp``), whose token ids are the
measure here. It applies the expressions of a name one after the other to what the one before has left, and keeps both
what an expression matches and what is between two matches.

Where llama.cpp cuts otherwise than the tokenizer that a model was published with, its way is followed: it knows upper
and lower case only in ASCII, so the classes of letters below say ``&&[^a-z]`` where the originals say ``\\p{Lu}``.
"""

from __future__ import annotations

from dataclasses import dataclass

# The letters of a class of DeepSeek's: those with a case, as far as the Unicode of its time had them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# Not (?i:...), which would take the long s and the Kelvin sign as well.
_CONTRACTIONS = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"


def _cased_words(upper: str, lower: str, ending: str = "") -> str:
    """Words that begin in upper case, or are in upper case altogether."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return rf"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}"


_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_cased_words(_UPPER, _LOWER)}|\p{{N}}|{_PATHS}|{_SPACES}"
_GPT4O = rf"{_cased_words(_UPPER, _LOWER, f'(?:{_CONTRACTIONS})?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_MARKS = r"[\p{L}\p{M}]"
_ASCII_SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?{_MARKS}+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\\s]]+"  # and all between, but blanks
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# 1 234 567; the first group is not cut off from what is before it.
_GROUPS_OF_DIGITS = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_LINES = r"[^\n]+|\n+"


@dataclass(frozen=True)
class PreTokenizer:
    """What a name of a pre-tokenizer stands for.

    Attributes:
        words: regular expressions (Oniguruma's dialect), applied in turn.
        whole_words: a word that is a token is not merged from its bytes (``ignore_merges``).
        begins: texts begin with the beginning-of-text token unless the file says otherwise.
        byte_level: tokens are spelled in the alphabet of GPT-2's bytes; otherwise in UTF-8, with ``<0xFF>`` for bytes.
        escapes_spaces: spaces are replaced by U+2581, as SentencePiece does.
    """

    words: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    byte_level: bool = True
    escapes_spaces: bool = False


_SPELLINGS: dict[PreTokenizer, str] = {
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
    "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    PreTokenizer((r"\p{N}", _GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizer((_LLAMA3,), whole_words=True, begins=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral "
    "midm-2.0 lfm2 jina-v5-nano",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), whole_words=True): "glm4 glm5",
    PreTokenizer((_QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    PreTokenizer(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{_MARKS}+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
    ): "qwen35",
    PreTokenizer((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}",)): "ufakzeka",
    PreTokenizer((_LINES, _QWEN2)): "laguna",
    PreTokenizer(
        (
            rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
            + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s",
        )
    ): "jais-2",
    PreTokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"), whole_words=True
    ): "minicpm5",
    PreTokenizer(
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",)
    ): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)): "seed-coder",
    PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): "exaone-moe",
    PreTokenizer((_TEKKEN,), whole_words=True, begins=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    PreTokenizer(
        (
            _cased_words(r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]", f"(?:{_CONTRACTIONS})?")
            + rf"|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}",
        ),
        whole_words=True,
    ): "granite-embed-multi-97m",
    PreTokenizer(
        (
            _GROUPS_OF_DIGITS,
            _cased_words(_MARKS, _MARKS, f"(?:{_CONTRACTIONS})?") + rf"|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}",
        )
    ): "tiny_aya cohere2moe",
    PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK,
            rf"{_ASCII_SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?{_MARKS}+"
            r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ): "spark2_5",
    PreTokenizer(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+"
            "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
            "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            _cased_words(_MARKS, _MARKS, f"(?:{_CONTRACTIONS})?") + rf"|\p{{N}}|{_PATHS}|{_SPACES}",
        ),
        whole_words=True,
    ): "youtu",
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
            r"\s+\z",
            _CJK_AND_HANGUL,
            r"\p{N}+",
        )
    ): "deepseek-llm",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_HANGUL, r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    PreTokenizer((_BLOOM,)): "poro-chat bloom gpt3-finnish",
    PreTokenizer((_BLOOM, r"\p{N}")): "viking",
    PreTokenizer(
        ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        begins=True,
    ): "chameleon",
    PreTokenizer((r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))")): "superbpe",
    PreTokenizer(
        (
            rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^\p{{Han}}]]+(?:{_CONTRACTIONS})?"
            rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",
        )
    ): "kimi-k2",
    PreTokenizer(
        (
            _GROUPS_OF_DIGITS,
            "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
            "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            _DEEPSEEK3,
        )
    ): "afmoe",
    PreTokenizer((_LINES,), byte_level=False, escapes_spaces=True): "gemma4 granite-embed-multi-311m sarvam-moe",
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for kind, names in _SPELLINGS.items() for name in names.split()}
