"""Every field of a request is followed, taken without an effect, told, or refused, as the documentation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import RequestError
from gossamer.protocol import BODIES
from gossamer.protocol.field_table import fate, markdown, rows
from gossamer.protocol.fields import REFUSED
from running_server import Running

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "fields.md"
TURNS = [{"role": "user", "content": "Q"}]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURNS},
    "/v1/completions": {"prompt": "Q"},
    "/v1/responses": {"input": "Q"},
    "/v1/messages": {"messages": TURNS, "max_tokens": 1},
}
# A value for each field that is taken without an effect.
VALUES: dict[str, Any] = {
    "modalities": ["text"],
    "truncation": "disabled",
    "user": "u",
    "mcp_servers": [],
    "stream_options": {"include_usage": True},
}


def cells(*fates: str) -> list[tuple[str, str]]:
    return [
        (url, name) for name, found in rows().items() for url, each in zip(BODIES, found, strict=True) if each in fates
    ]


def test_the_documentation_has_the_table() -> None:
    assert PAGE.read_text().endswith(markdown()), "python -m gossamer.protocol.field_table prints what belongs there"


@pytest.mark.parametrize(("url", "name"), cells("told", "no effect"))
def test_a_field_without_an_effect_changes_nothing_and_is_told_if_it_asks_for_something(url: str, name: str) -> None:
    least = LEAST[url] | ({"stream": True} if name == "stream_options" else {})
    plain, given = (BODIES[url].parse(least | more) for more in ({}, {name: VALUES.get(name, {"any": "thing"})}))
    assert given.engine_prompts() == plain.engine_prompts()
    assert given.to_sampling_params() == plain.to_sampling_params()
    assert given.ignored == ([name] if fate(url, name) == "told" else [])


@pytest.mark.parametrize(("url", "name"), [cell for cell in cells("refused") if cell[1] in REFUSED])
def test_what_is_refused_is_taken_at_a_value_that_asks_for_nothing(url: str, name: str) -> None:
    for value in (False, 0, "", [], {}):
        assert not BODIES[url].parse(LEAST[url] | {name: value}).ignored


@pytest.mark.parametrize(("url", "name"), cells("refused", ""))
def test_what_is_refused_is_named_with_advice(url: str, name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not supported") as refused:
        BODIES[url].parse(LEAST[url] | {name: "x"})
    assert refused.value.param == name and refused.value.message.endswith(REFUSED.get(name, ""))


@pytest.mark.parametrize("url", BODIES)
def test_null_is_not_given_whatever_the_field(url: str) -> None:
    every = dict.fromkeys(rows()) | LEAST[url]
    assert BODIES[url].parse(every).ignored == []


def test_a_strict_server_refuses_what_would_be_told(server: Running) -> None:
    import dataclasses

    lenient = server.server.service.options
    server.server.service.options = dataclasses.replace(lenient, strict=True)
    try:
        for url, name in cells("told"):
            status, answer = server.call(url, LEAST[url] | {name: {"any": "thing"}})
            message = answer["error"]["message"]
            assert status == 400 and message.startswith(f"{name} is not supported"), (url, name)
    finally:
        server.server.service.options = lenient
    status, _ = server.call("/v1/completions", LEAST["/v1/completions"] | {"store": True, "max_tokens": 1})
    assert status == 200
