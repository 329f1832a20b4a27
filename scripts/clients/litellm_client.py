"""litellm, as a client of a server with OpenAI's API."""

from __future__ import annotations

import litellm
from cells import PARAMETERS, QUESTION, address, cell, check_arguments, run

URL, MODEL, ENCODER = address()
TOOL = {"type": "function", "function": {"name": "weather", "description": "A forecast.", "parameters": PARAMETERS}}
ASKED = [{"role": "user", "content": QUESTION}]


def ask(**fields: object) -> object:
    given = {"messages": ASKED, "max_tokens": 64, "temperature": 0} | fields
    return litellm.completion(f"openai/{MODEL}", api_base=f"{URL}/v1", api_key="none", num_retries=0, **given)


@cell("answer")
def answer() -> None:
    assert ask().choices[0].message.content


@cell("stream")
def stream() -> None:
    parts = list(ask(stream=True, max_tokens=12))
    whole = ask(max_tokens=12).choices[0].message.content
    assert litellm.stream_chunk_builder(parts).choices[0].message.content == whole


@cell("tools")
def tools() -> None:
    made = ask(tools=[TOOL]).choices[0].message
    assert made.content or made.tool_calls


@cell("required")
def required() -> None:
    check_arguments(ask(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0].function.arguments)
    made = litellm.stream_chunk_builder(list(ask(tools=[TOOL], tool_choice="required", stream=True)))
    check_arguments(made.choices[0].message.tool_calls[0].function.arguments)


@cell("structured")
def structured() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": PARAMETERS, "strict": True}}
    check_arguments(ask(response_format=schema).choices[0].message.content)


@cell("responses")
def responses() -> None:
    made = litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, api_base=f"{URL}/v1", api_key="none", max_output_tokens=8
    )
    assert made.output


@cell("embeddings")
def embeddings() -> None:
    made = litellm.embedding(
        "openai/all-minilm-l6-v2", input=["a cat", "a dog"], api_base=f"{ENCODER}/v1", api_key="none"
    )
    assert len(made.data[1]["embedding"]) == 384


run()
