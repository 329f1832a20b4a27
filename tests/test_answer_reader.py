"""Answers are read back to what they say, however their text is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.chat import Answer, AnswerReader, Tool
from gossamer.chat.answer_reader import THINK
from gossamer.chat.call_formats import FORMATS, WILD, CallFormat

LOOK = Tool(
    "look",
    {"type": "object", "properties": {"at": {"type": "string"}, "n": {"type": "integer"}, "tags": {"type": "array"}}},
)
TOOLS = [LOOK, Tool("go_on")]
ODD = st.text(st.sampled_from(list('ab{}[]"\\<>/\n é🙂')), max_size=12) | st.sampled_from(
    ["</tool_call>", '"}}\n</tool_call>', "<tool_call>", "</think>", "[TOOL_CALLS]", "\\", '\\"']
)


def spelled(format: CallFormat, name: str, calls: list[dict[str, object]]) -> str:
    """Calls of one function."""
    texts = []
    for arguments in calls:
        if format.tags is None:
            texts.append(json.dumps(arguments, ensure_ascii=False))
        else:
            opening, named, closing = format.tags
            values = {key: each if isinstance(each, str) else json.dumps(each) for key, each in arguments.items()}
            texts.append("".join(f"{opening}{key}{named}{each}{closing}" for key, each in values.items()))
    return format.spell([(name, text) for text in texts]).replace(WILD, "7")


def read(text: str, cuts: list[int], format: CallFormat | None, **options: bool) -> Answer:
    reader, answer, start = AnswerReader(format, TOOLS, **options), Answer(), 0
    for end in [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]:
        for part in reader.push(text[start:end]):
            answer.add(part)
        start = end
    for part in reader.finish():
        answer.add(part)
    return answer


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(["", "Well.", "a < b", "<tool", "[TOOL"]),
    st.lists(st.tuples(ODD, st.integers(0, 99), st.lists(ODD, max_size=2)), min_size=1, max_size=3),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_calls_are_read_as_they_were_meant(name, content, arguments, cuts):
    format = FORMATS[name]
    if format.anchored:
        content, arguments = "", arguments[:1]
    # what ends a value of this format cannot be in one
    meant = [
        {"at": at, "n": n, "tags": tags}
        for at, n, tags in arguments
        if format.tags is None or format.tags.closing not in at
    ]
    calls = spelled(format, "look", meant) if meant else ""
    answer = read(f"{content}\n{calls}" if content and calls else content or calls, cuts, format)
    assert answer.content == content
    assert [call.name for call in answer.calls] == ["look"] * len(meant)
    assert [json.loads(call.arguments) for call in answer.calls] == meant
    assert len({call.id for call in answer.calls}) == len(meant)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from(list("ab<>/\n ")), max_size=20),
    st.text(st.sampled_from(list("cd<>\n ")), max_size=20),
    st.booleans(),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_thoughts_are_apart_from_content(thoughts, content, opened, cuts):
    text = f"{'' if opened else '<think>'}\n{thoughts}\n</think>\n\n{content}"
    answer = read(text, cuts, None, marks=THINK, opened=opened)
    assert (answer.reasoning, answer.content) == (thoughts.strip(), content.lstrip())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_answer_may_be_cut_anywhere(name):
    format = FORMATS[name]
    text = spelled(format, "look", [{"at": 'x"\\ 🙂', "n": 12}])
    whole = read(text, [], format).calls[0].arguments
    for length in range(len(text)):
        answer = read(text[:length], list(range(length)), format)
        assert len(answer.calls) <= 1 and (not answer.calls or whole.startswith(answer.calls[0].arguments.rstrip('"}')))
        if length > len(format.marker + format.begin + format.opening):
            assert answer.content == ""  # no marker is told as text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no <tool call> here", "no <tool call> here"),
        ('<tool_call>\n{"name": "unknown", "arguments": {}}', '<tool_call>\n{"name": "unknown", "arguments": {}}'),
        ("<tool_call> and <tool_call> more", "<tool_call> and <tool_call> more"),
        ("ends with blanks \n\n", "ends with blanks \n\n"),
        ("", ""),
    ],
)
def test_what_is_no_call_is_text(text, content):
    for cuts in ([], list(range(len(text)))):
        answer = read(text, cuts, FORMATS["hermes"])
        assert (answer.content, answer.calls) == (content, [])


def test_a_call_within_thoughts_is_a_thought():
    text = f"<think>{spelled(FORMATS['hermes'], 'look', [{}])}</think>Done."
    answer = read(text, [], FORMATS["hermes"], marks=THINK)
    assert (answer.content, answer.calls) == ("Done.", []) and "look" in answer.reasoning


def test_text_is_told_as_soon_as_it_is_known():
    reader = AnswerReader(FORMATS["hermes"], TOOLS)
    assert [part.text for part in reader.push("Hello ")] == ["Hello"]
    assert [part.text for part in reader.push("you <")] == [" you"]
    assert [part.text for part in reader.push("3")] == [" <3"]
