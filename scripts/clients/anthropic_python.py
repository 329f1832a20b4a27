"""Anthropic's Python client, at /v1/messages."""

from __future__ import annotations

import anthropic
from cells import PARAMETERS, QUESTION, address, cell, check_arguments, run

URL, MODEL, _ = address()
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
TOOL = {"name": "weather", "description": "A forecast.", "input_schema": PARAMETERS}
GREEDY = {"temperature": 0}  # the client's methods take it no more
ASKED = [{"role": "user", "content": QUESTION}]


@cell("answer")
def answer() -> None:
    made = client.messages.create(model=MODEL, messages=ASKED, system="Be short.", max_tokens=8)
    assert made.content[0].text and made.stop_reason == "max_tokens" and made.usage.output_tokens == 8
    assert client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens > 4


@cell("stream")
def stream() -> None:
    with client.messages.stream(model=MODEL, messages=ASKED, max_tokens=12, extra_body=GREEDY) as events:
        text = "".join(events.text_stream)
        assert text == events.get_final_message().content[0].text
    assert text == client.messages.create(model=MODEL, messages=ASKED, max_tokens=12, extra_body=GREEDY).content[0].text


@cell("tools")
def tools() -> None:
    made = client.messages.create(model=MODEL, messages=ASKED, tools=[TOOL], max_tokens=32)
    assert made.content


@cell("required")
def required() -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        choice["disable_parallel_tool_use"] = True
        asked = {"model": MODEL, "messages": ASKED, "tools": [TOOL], "tool_choice": choice, "max_tokens": 64}
        with client.messages.stream(**asked, extra_body=GREEDY) as events:
            streamed = events.get_final_message()
        whole = client.messages.create(**asked, extra_body=GREEDY)
        for made in (whole, streamed):
            call = next(block for block in made.content if block.type == "tool_use")
            assert made.stop_reason == "tool_use" and check_arguments(call.input)


@cell("results")
def results() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris", "days": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "blue"}]}
    history = [*ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    made = client.messages.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=16)
    assert made.content


run()
