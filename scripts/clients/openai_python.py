"""OpenAI's Python client."""

from __future__ import annotations

import math

import openai
from cells import PARAMETERS, QUESTION, address, cell, check_arguments, run
from pydantic import BaseModel

URL, MODEL, ENCODER = address()
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
TOOL = {"type": "function", "function": {"name": "weather", "description": "A forecast.", "parameters": PARAMETERS}}
ASKED = [{"role": "user", "content": QUESTION}]


class Person(BaseModel):
    name: str
    age: int


@cell("answer")
def answer() -> None:
    made = client.chat.completions.create(model=MODEL, messages=ASKED, max_completion_tokens=8, seed=1, store=True)
    assert made.choices[0].message.content and made.usage.completion_tokens == 8


@cell("stream")
def stream() -> None:
    asked = {"model": MODEL, "messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    with client.chat.completions.stream(**asked) as events:  # its final completion is an error if an answer is cut
        assert "".join(event.delta for event in events if event.type == "content.delta") == whole
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage.completion_tokens == 12


@cell("tools")
def tools() -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[TOOL], tool_choice="auto", max_tokens=32, temperature=0
    )
    assert made.choices[0].message.content or made.choices[0].message.tool_calls


@cell("required")
def required() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        asked = {"model": MODEL, "messages": ASKED, "tools": [TOOL], "tool_choice": choice, "max_tokens": 64}
        asked |= {"temperature": 0, "parallel_tool_calls": False}
        (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
        check_arguments(call.function.arguments)
        with client.chat.completions.stream(**asked) as events:
            (streamed,) = list(events) and events.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments


@cell("results")
def results() -> None:
    calls = [
        {"id": f"call{i}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for i, arguments in enumerate(('{"city": "Paris", "days": 1}', '{"city":"Oslo","days":2}'))
    ]
    history = [*ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]
    history += [{"role": "tool", "tool_call_id": f"call{i}", "content": '{"sky": "blue"}'} for i in range(2)]
    made = client.chat.completions.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=16)
    assert made.choices[0].message.content is not None


@cell("structured")
def structured() -> None:
    made = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Ada is 36."}], response_format=Person, max_tokens=64
    )
    assert isinstance(made.choices[0].message.parsed, Person)


@cell("responses")
def responses() -> None:
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    asked = {"model": MODEL, "input": QUESTION, "tools": [tool], "max_output_tokens": 64}
    made = client.responses.create(**asked, tool_choice="required", parallel_tool_calls=False)
    (call,) = [item for item in made.output if item.type == "function_call"]
    check_arguments(call.arguments)
    given = [{"type": "function_call_output", "call_id": call.call_id, "output": "blue"}]
    with client.responses.stream(model=MODEL, previous_response_id=made.id, input=given, max_output_tokens=8) as events:
        final = list(events)[-1].response  # get_final_response() knows none that was cut
    assert final.output_text and final.previous_response_id == made.id


@cell("embeddings")
def embeddings() -> None:
    encoder = openai.OpenAI(base_url=f"{ENCODER}/v1", api_key="none", max_retries=0)
    model = encoder.models.list().data[0].id
    found = encoder.embeddings.create(model=model, input=["a cat", "a kitten", "the stock market"]).data
    near, far = (sum(map(math.prod, zip(found[0].embedding, other.embedding, strict=True))) for other in found[1:])
    assert near > far and abs(math.hypot(*found[0].embedding) - 1) < 1e-3


run()
