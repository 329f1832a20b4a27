"""Thoughts of a bounded length: their end is forced in the template's spelling, and the answer goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import THINKING
from gossamer import LLM, ReasoningParams, SamplingParams, StructuredOutputsParams, Tool, ToolUse
from gossamer.chat import ChatFormat
from gossamer.engine.reasoning import Reasoning
from gossamer.errors import InvalidSamplingParamsError
from running_server import MODEL, Running, running

TINY_CONTEXT = 256
ASK: list[Any] = [{"role": "user", "content": "Why?"}]
PARAMS: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
BOUND = 5


@given(
    st.text("ab<>/think \n", max_size=40),
    st.booleans(),
    st.integers(0, 12) | st.none(),
    st.integers(1, 3),
)
def test_thoughts_never_go_beyond_their_bound(text: str, begun: bool, most: int | None, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    params = ReasoningParams(begun=begun, max_tokens=most)
    closing = list(params.closing)
    thoughts = Reasoning(params, [ord(character) for character in closing])
    written, forced = "", ""
    while pieces or thoughts.forced is not None:
        token = thoughts.forced
        piece = pieces.pop(0) if token is None else chr(token)
        forced += "" if token is None else piece
        written += piece
        thoughts.push(-1 if token is None else token, written, whole=True)
    inner = written if begun else written.lstrip().removeprefix("<think>")
    thinks = begun or written.lstrip().startswith("<think>")
    assert forced in ("", params.closing)
    if forced:
        assert thinks and most is not None
        inside = inner[: inner.index(params.closing)] if params.closing in inner else inner
        assert len(inside) <= (most + 1) * size
    if thinks and most is not None and "</think>" not in inner:
        assert len(inner) <= (most + 1) * size


def test_the_end_comes_once_the_bound_is_reached(tiny: Path) -> None:
    with LLM(tiny) as llm:
        closing = llm.tokenizer.encode("</think>\n", add_special_tokens=False)
        for most in (0, 1, 7):
            thoughts = ReasoningParams(begun=True, max_tokens=most, closing="</think>\n")
            for stream in (False, True):
                params = SamplingParams(**PARAMS, ignore_eos=True, logprobs=1, reasoning=thoughts)
                outputs = [*llm.stream("Why?", params)][-1:] if stream else llm.generate("Why?", params)
                completion = outputs[0].outputs[0]
                start = next(n for n in range(24) if completion.token_ids[n : n + len(closing)] == closing)
                assert most <= start <= most + 3  # no character is cut
                assert completion.num_reasoning_tokens == start + len(closing) - 1  # without the line break
                assert "</think>\n" in completion.text and len(completion.token_ids) == 24
        free = llm.generate("Why?", SamplingParams(**PARAMS, ignore_eos=True))[0].outputs[0]
        bound = llm.generate(
            "Why?", SamplingParams(**PARAMS, ignore_eos=True, reasoning=ReasoningParams(begun=True, max_tokens=4))
        )[0].outputs[0]
        assert free.token_ids[:4] == bound.token_ids[:4] and free.num_reasoning_tokens == 0


@pytest.mark.parametrize("values", [{"max_tokens": -1}, {"begin": ""}, {"closing": "x"}, {"max_tokens": True}])
def test_what_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidSamplingParamsError):
        ReasoningParams(**values)


def think(path: Path, template: str = THINKING) -> LLM:
    llm = LLM(path, memory="256MiB", max_model_len=512)
    llm.tokenizer.chat_template = template
    return llm


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Running]:
    with running(lambda: think(smollm2_path)) as server:
        yield server


def test_chat_goes_on_with_an_answer(server: Running, client: openai.OpenAI) -> None:
    body = {"messages": ASK, **PARAMS, "max_reasoning_tokens": BOUND}
    status, answer = server.call("/v1/chat/completions", body)
    message = answer["choices"][0]["message"]
    assert status == 200 and message["reasoning_content"] and message["content"]
    thoughts = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert BOUND < thoughts < answer["usage"]["completion_tokens"]
    deltas = [event["choices"][0]["delta"] for event in server.events("/v1/chat/completions", body)]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    free = server.call("/v1/chat/completions", {"messages": ASK, **PARAMS})[1]
    assert free["choices"][0]["message"]["reasoning_content"].startswith(message["reasoning_content"])
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] == free["usage"]["completion_tokens"]


def test_responses_and_messages_too(server: Running, client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="Why?", temperature=0, max_output_tokens=24, extra_body={"max_reasoning_tokens": BOUND}
    )
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens > BOUND
    body = {"messages": ASK, **PARAMS, "thinking": {"type": "enabled", "budget_tokens": BOUND}}
    answer = server.call("/v1/messages", body)[1]
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] > BOUND


def test_a_form_holds_behind_thoughts(server: Running) -> None:
    body = {"messages": ASK, **PARAMS, "max_tokens": 60, "max_reasoning_tokens": BOUND}
    for form, answers in (
        ({"choice": ["sun", "rain"]}, ("sun", "rain")),
        ({"regex": "a/[b]"}, ("a/b",)),
        ({"json": {"const": 7}}, ("7",)),
    ):
        status, answer = server.call("/v1/chat/completions", body | {"structured_outputs": form})
        assert status == 200 and answer["choices"][0]["message"]["content"] in answers
        assert answer["choices"][0]["message"]["reasoning_content"]


def test_a_call_follows_thoughts(smollm2_path: Path) -> None:
    with think(smollm2_path) as llm:
        use = ToolUse([Tool("look", {"type": "object", "properties": {"at": {"enum": ["sea"]}}})], required=True)
        params = SamplingParams(temperature=0, max_tokens=80)
        (output,) = llm.chat(ASK, params, False, tools=use, max_reasoning_tokens=BOUND)
        answer = output.outputs[0].answer
        assert answer.reasoning and answer.calls[0].name == "look"
        with_form = SamplingParams(
            temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(choice=["yes"])
        )
        (output,) = llm.chat(ASK, with_form, False, max_reasoning_tokens=0)
        assert output.outputs[0].answer.content == "yes" and not output.outputs[0].answer.reasoning


def test_the_template_says_how_thoughts_end(smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' if m.reasoning_content else '' }}"
        "{{ m.content }}{% endfor %}"
    )
    chat = ChatFormat(tokenizer)
    thoughts = chat.reasoning({}, 3)
    assert thoughts is not None and (thoughts.begin, thoughts.closing) == ("[THINK]", "[/THINK]")
    reader = chat.reader(None, {})
    assert reader is not None
    assert [(part.kind, part.text) for part in reader.push("[THINK]a[/THINK]b")] == [
        ("reasoning", "a"),
        ("content", "b"),
    ]
