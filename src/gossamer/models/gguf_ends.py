"""Which tokens of a GGUF file end a text. The rules are llama.cpp's (``special_eog_ids`` in its llama-vocab.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Keys that hold the id of a token at which generation ends, the end of a text itself first.
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Spellings of such tokens, for files that have no key for them.
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    }
)
# Where one of the keys is missing, the token of one of these spellings takes its place.
_FIM_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_ids(keys: Mapping[str, int], tokens: Sequence[str]) -> list[int]:
    """The ids of all tokens that end a text, the end of text itself first.

    Args:
        keys: ids by the name that their key has before ``_token_id``: ``eos``, ``eot``, ``fim_pad`` ...
        tokens: spellings, by id.

    >>> end_ids({"eos": 0}, ["</s>", "<|im_end|>", "word"])
    [0, 1]
    """
    place = {token: number for number, token in enumerate(tokens)}
    found = [keys[name] for name in _END_KEYS if name in keys]
    for name, texts in _FIM_TEXTS.items():
        if name not in keys:
            found += [place[text] for text in texts if text in place][:1]
    found += sorted(place[text] for text in END_TEXTS if text in place)
    # A channel of gpt-oss and of Solar ends with <|end|>, and the answer goes on.
    if place.keys() >= {"<|return|>", "<|call|>"} or place.keys() >= {"<|calls|>", "<|flush|>"}:
        found = [number for number in found if tokens[number] != "<|end|>"]
    if place.keys() & {"<|tool_response>", "<|plamo:eos|>"}:  # their </s> is a tag of HTML
        found = [number for number in found if tokens[number] != "</s>"]
    return list(dict.fromkeys(found))
