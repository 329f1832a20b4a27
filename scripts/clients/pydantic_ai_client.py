"""pydantic-ai: an agent with a tool, over both of OpenAI's APIs."""

from __future__ import annotations

import asyncio
from typing import Literal

from cells import QUESTION, address, cell, run
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

URL, MODEL, _ = address()
provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
LIMITS = ModelSettings(temperature=0, max_tokens=64)
asked: list[str] = []


class Person(BaseModel):
    name: str
    age: int


def weather(city: Literal["Paris", "Oslo"], days: int) -> str:
    """A forecast."""
    asked.append(city)
    return "blue"


@cell("answer")
def answer() -> None:
    result = Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=LIMITS).run_sync(QUESTION)
    assert result.output and result.usage.output_tokens > 0


@cell("stream")
def stream() -> None:
    async def follow() -> None:
        agent = Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=LIMITS)
        async with agent.run_stream(QUESTION) as result:
            assert [text async for text in result.stream_text(debounce_by=None)]

    asyncio.run(follow())


@cell("tools")
def tools() -> None:
    agent = Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=LIMITS, tools=[weather])
    assert agent.run_sync(QUESTION).output is not None


@cell("structured")
def structured() -> None:
    """Its output type is a call of a tool that is required."""
    agent = Agent(OpenAIChatModel(MODEL, provider=provider), model_settings=LIMITS, output_type=Person)
    assert isinstance(agent.run_sync("Ada is 36.").output, Person)


@cell("responses")
def responses() -> None:
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings=LIMITS, output_type=Person)
    assert isinstance(agent.run_sync("Ada is 36.").output, Person)


run()
