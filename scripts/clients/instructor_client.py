"""instructor: objects out of answers."""

from __future__ import annotations

from typing import Annotated

import instructor
import openai
from cells import address, cell, run
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, _ = address()


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a small model adds fields without end
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=150)]


ASKED = [{"role": "user", "content": "Ada is 36."}]


def make(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode)


@cell("required")
def required() -> None:
    made = make(instructor.Mode.TOOLS).create(
        model=MODEL, messages=ASKED, response_model=Person, max_tokens=64, max_retries=1, temperature=0
    )
    assert isinstance(made, Person)


@cell("structured")
def structured() -> None:
    made = make(instructor.Mode.JSON_SCHEMA).create(
        model=MODEL, messages=ASKED, response_model=Person, max_tokens=256, max_retries=1, temperature=0
    )
    assert isinstance(made, Person)


@cell("stream")
def stream() -> None:
    parts = list(
        make(instructor.Mode.TOOLS).create_partial(
            model=MODEL, messages=ASKED, response_model=Person, max_tokens=64, temperature=0
        )
    )
    assert parts and parts[-1].age is not None


run()
