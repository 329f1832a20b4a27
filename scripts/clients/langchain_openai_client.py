"""langchain-openai, and an agent of langgraph."""

from __future__ import annotations

from typing import Literal

from cells import QUESTION, address, cell, check_arguments, run
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL, MODEL, ENCODER = address()


def model(**options: object) -> ChatOpenAI:
    given = {"temperature": 0, "max_tokens": 64} | options
    return ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_retries=0, **given)


@tool
def weather(city: Literal["Paris", "Oslo"], days: int) -> str:
    """A forecast."""
    return "blue"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@cell("answer")
def answer() -> None:
    assert model().invoke(QUESTION).content


@cell("stream")
def stream() -> None:
    parts = list(model(max_tokens=12, stream_usage=True).stream(QUESTION))
    assert "".join(part.text for part in parts) == model(max_tokens=12).invoke(QUESTION).content


@cell("tools")
def tools() -> None:
    made = model().bind_tools([weather]).invoke(QUESTION)
    assert made.content or made.tool_calls


@cell("required")
def required() -> None:
    for choice in ("any", "weather"):
        bound = model().bind_tools([weather], tool_choice=choice)
        check_arguments(bound.invoke(QUESTION).tool_calls[0]["args"])
    whole = None
    for part in bound.stream(QUESTION):
        whole = part if whole is None else whole + part
    check_arguments(whole.tool_calls[0]["args"])


@cell("results")
def results() -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    call = {"name": "weather", "args": {"city": "Paris", "days": 1}, "id": "call1", "type": "tool_call"}
    history = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), ToolMessage("blue", tool_call_id="call1")]
    assert model(max_tokens=16).bind_tools([weather]).invoke(history) is not None


@cell("structured")
def structured() -> None:
    for method in ("json_schema", "function_calling"):
        made = model().with_structured_output(Person, method=method).invoke("Ada is 36.")
        assert isinstance(made, Person)


@cell("responses")
def responses() -> None:
    made = model(use_responses_api=True).bind_tools([weather], tool_choice="any").invoke(QUESTION)
    check_arguments(made.tool_calls[0]["args"])


@cell("embeddings")
def embeddings() -> None:
    encoder = OpenAIEmbeddings(
        model="all-minilm-l6-v2", base_url=f"{ENCODER}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert len(encoder.embed_documents(["a cat", "a dog"])[1]) == 384


run()
