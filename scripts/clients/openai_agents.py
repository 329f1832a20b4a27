"""The OpenAI Agents SDK: a run with a tool, over both of its APIs."""

from __future__ import annotations

import asyncio
from typing import Literal

import agents
from agents.models.openai_responses import OpenAIResponsesModel
from cells import QUESTION, address, cell, run
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, MODEL, _ = address()
agents.set_tracing_disabled(True)
asked: list[tuple[str, int]] = []


@agents.function_tool
def weather(city: Literal["Paris", "Oslo"], days: int) -> str:
    """A forecast."""
    asked.append((city, days))
    return "blue"


class Person(BaseModel):
    name: str
    age: int


def agent(over: type, **settings: object) -> agents.Agent:
    output = settings.pop("output_type", None)
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)  # of one event loop
    limits = agents.ModelSettings(temperature=0, max_tokens=512, **settings)  # a cut answer is an error to it
    tools = [] if output else [weather]
    return agents.Agent(
        "helper", instructions="Be short.", model=over(MODEL, client), model_settings=limits, tools=tools,
        output_type=output,
    )  # fmt: skip


@cell("answer")
def answer() -> None:
    assert agents.Runner.run_sync(agent(agents.OpenAIChatCompletionsModel), QUESTION).final_output is not None


@cell("stream")
def stream() -> None:
    async def follow() -> None:
        result = agents.Runner.run_streamed(agent(agents.OpenAIChatCompletionsModel, tool_choice="required"), QUESTION)
        async for _ in result.stream_events():
            pass
        assert result.final_output is not None

    asked.clear()
    asyncio.run(follow())
    assert asked


@cell("required")
def required() -> None:
    asked.clear()
    result = agents.Runner.run_sync(agent(agents.OpenAIChatCompletionsModel, tool_choice="required"), QUESTION)
    assert asked and asked[0][0] in ("Paris", "Oslo") and result.final_output is not None


@cell("structured")
def structured() -> None:
    result = agents.Runner.run_sync(agent(agents.OpenAIChatCompletionsModel, output_type=Person), "Ada is 36.")
    assert isinstance(result.final_output, Person)


@cell("responses")
def responses() -> None:
    async def follow() -> None:
        result = agents.Runner.run_streamed(agent(OpenAIResponsesModel, tool_choice="required"), QUESTION)
        async for _ in result.stream_events():
            pass
        assert result.final_output is not None

    asked.clear()
    result = agents.Runner.run_sync(agent(OpenAIResponsesModel, tool_choice="required"), QUESTION)
    assert asked and result.final_output is not None
    asyncio.run(follow())


run()
