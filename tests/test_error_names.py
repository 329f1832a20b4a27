"""Errors of endpoints whose bodies are translated name the fields of the body that the client has sent."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gossamer.errors import RequestError
from gossamer.protocol import BODIES
from gossamer.protocol.response_store import ResponseStore
from running_server import Running

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
USER = {"role": "user", "content": "Q"}
RESPONSES, MESSAGES, CHAT = "/v1/responses", "/v1/messages", "/v1/chat/completions"
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    RESPONSES: {"input": "Q"},
    MESSAGES: {"messages": [USER], "max_tokens": 1},
}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "T"}]}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "x"}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
FUNCTION = {"type": "function", "name": "f", "parameters": CITY}
TOOL = {"name": "f", "input_schema": CITY}

# Endpoint, what is wrong, the field that the error names, and a part of the message behind it.
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (RESPONSES, {"input": 5}, "input", "valid string"),
    (RESPONSES, {"input": [5]}, "input.0", "dictionary"),
    (RESPONSES, {"input": []}, "input", "at least 1 item"),
    (RESPONSES, {"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "'user'"),
    (RESPONSES, {"input": [USER, {"role": 5, "content": "x"}]}, "input.1.role", "must be a string"),
    (RESPONSES, {"instructions": "R", "input": [USER, {"role": "robot"}]}, "input.1.role", "'user'"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "input_image"),
    (RESPONSES, {"input": [USER, {"role": "user", "content": 5}]}, "input.1.content", "must be a string"),
    (RESPONSES, {"input": [USER, OUTPUT]}, "input.1.call_id", "no message before called that"),
    (RESPONSES, {"instructions": "R", "input": [THOUGHT, CALL, OUTPUT]}, "input.2.call_id", "no message before"),
    (RESPONSES, {"input": [USER, THOUGHT, CALL | {"arguments": 5}]}, "input.2.arguments", "valid"),
    (RESPONSES, {"input": [CALL | {"name": None}]}, "input.0.name", "must be a string"),
    (RESPONSES, {"input": [CALL | {"call_id": 1}]}, "input.0.call_id", "must be a string"),
    (RESPONSES, {"input": [CALL | {"type": "custom_tool_call", "input": {}}]}, "input.0.input", "must be a string"),
    (RESPONSES, {"messages": [USER]}, "messages", "is not supported"),
    (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens", "greater than or equal to 0"),
    (RESPONSES, {"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_output_tokens (2)"),
    (RESPONSES, {"max_output_tokens": 2, "max_tokens": 3}, "max_tokens", "and max_output_tokens mean the same"),
    (RESPONSES, {"top_logprobs": "5"}, "top_logprobs", "valid integer"),
    (RESPONSES, {"temperature": -1}, "temperature", "a number >= 0"),
    (RESPONSES, {"reasoning": {"effort": "enormous"}}, "reasoning.effort", "'none'"),
    (RESPONSES, {"reasoning": {"budget": 5}}, "reasoning.budget", "is not supported"),
    (RESPONSES, {"tools": [{"type": "function"}]}, "tools.0.name", "is missing"),
    (RESPONSES, {"tools": [FUNCTION | {"name": 5}]}, "tools.0.name", "valid string"),
    (RESPONSES, {"tools": [FUNCTION | {"parameters": []}]}, "tools.0.parameters", "valid dictionary"),
    (RESPONSES, {"tools": [FUNCTION | {"colour": "red"}]}, "tools.0.colour", "is not supported"),
    (RESPONSES, {"tools": [{"type": "custom"}]}, "tools.0.name", "is missing"),
    (RESPONSES, {"tools": [5]}, "tools.0", "dictionary"),
    (RESPONSES, {"tools": [FUNCTION, FUNCTION]}, "tools", "two functions"),
    (RESPONSES, {"tools": [FUNCTION], "tool_choice": 5}, "tool_choice", "'required'"),
    (RESPONSES, {"tools": [FUNCTION], "tool_choice": "any"}, "tool_choice", "'required'"),
    (RESPONSES, {"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tool_choice.name", "must be a string"),
    (RESPONSES, {"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "'web_search'"),
    (RESPONSES, {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools", "a list"),
    (
        RESPONSES,
        {
            "tools": [FUNCTION],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]},
        },
        "tool_choice.tools.0.name",
        "must be a string",
    ),
    (RESPONSES, {"text": {"format": {"type": "xml"}}}, "text.format.type", "'json_schema'"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}},
        "text.format.schema",
        "dictionary",
    ),
    (RESPONSES, {"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (MESSAGES, {"messages": 5}, "messages", "valid list"),
    (MESSAGES, {"messages": [5]}, "messages.0", "dictionary"),
    (MESSAGES, {"messages": [USER, {"role": "tool", "content": "x"}]}, "messages.1.role", "must be"),
    (MESSAGES, {"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.tool_use_id", "no message"),
    (
        MESSAGES,
        {"system": "R", "messages": [{"role": "user", "content": [{"type": "text", "text": "T"}, RESULT]}]},
        "messages.0.content.1.tool_use_id",
        "is 'c'; no message before called that",
    ),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [RESULT | {"content": 5}]}]},
        "messages.0.content.0.content",
        "a text or a list",
    ),
    (
        MESSAGES,
        {"messages": [USER, {"role": "assistant", "content": [USE | {"input": 5}]}]},
        "messages.1.content.0",
        "",
    ),
    (MESSAGES, {"system": 5}, "system", "valid string"),
    (MESSAGES, {"system": [{"type": "text", "text": "T"}, {"type": "image"}]}, "system.1", "'image'"),
    (MESSAGES, {"max_tokens": "5"}, "max_tokens", "valid integer"),
    (MESSAGES, {"max_tokens": None}, "max_tokens", "is missing"),
    (MESSAGES, {"max_output_tokens": 5}, "max_output_tokens", "is not supported"),
    (MESSAGES, {"stop_sequences": [""]}, "stop_sequences", "non-empty"),
    (MESSAGES, {"stop_sequences": ["a"] * 100, "stop": ["b"] * 100}, "stop_sequences", "at most 128"),
    (MESSAGES, {"tools": [TOOL | {"name": None}]}, "tools.0.name", "is missing"),
    (MESSAGES, {"tools": [TOOL | {"input_schema": 5}]}, "tools.0.input_schema", "dictionary"),
    (MESSAGES, {"tools": [5]}, "tools.0", "dictionary"),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "names the function"),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.type", "'any'"),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "go"}}, "tool_choice", "not among the tools"),
    (MESSAGES, {"output_config": {"effort": "none"}}, "output_config.effort", "'low'"),
    (MESSAGES, {"output_config": {"format": {"type": "json_object"}}}, "output_config.format", "json_schema"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens", "greater than"),
    (CHAT, {"prompt": "Q"}, "prompt", "is not supported"),
    (CHAT, {"tool_choice": 5}, "tool_choice", "'required'"),
    (CHAT, {"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_completion_tokens (2)"),
]


@pytest.mark.parametrize(("url", "change", "name", "reason"), BAD)
def test_a_refused_body_is_told_the_name_of_its_own_field(
    server: Running, url: str, change: dict[str, Any], name: str, reason: str
) -> None:
    status, answer = server.call(url, LEAST[url] | change)
    message = answer["error"]["message"]
    assert status == 400 and reason in message
    if url == MESSAGES:  # Anthropic's errors have no field for it
        assert message.startswith(name)
    else:
        assert answer["error"]["param"] == name and message.startswith(name)


SCHEMA = {"type": "object", "patternProperties": {"(?=a)": {"type": "string"}}, "additionalProperties": False}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "change", "name"),
    [
        (RESPONSES, {"input": "word " * 9000}, "input"),
        (RESPONSES, {"top_logprobs": 1000}, "top_logprobs"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, "text.format"),
        (RESPONSES, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, ""),
        (CHAT, {"messages": [USER | {"content": "word " * 9000}]}, "messages"),
        (CHAT, {"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    ],
)
def test_so_is_a_body_that_the_engine_refuses(
    server: Running, url: str, change: dict[str, Any], name: str, stream: bool
) -> None:
    status, answer = server.call(url, LEAST[url] | change | {"stream": stream})
    assert (status, answer["error"]["param"]) == (400, name or "response_format")


def test_items_that_are_kept_are_named_by_the_response_that_they_are_of() -> None:
    kept = ResponseStore(1 << 20).of("")
    kept.keep({"id": "resp_1", "output": [CALL | {"id": "fc_1"}]}, [])
    body = BODIES[RESPONSES].parse({"previous_response_id": "resp_1", "input": [OUTPUT | {"call_id": "a"}, OUTPUT]})
    with pytest.raises(RequestError, match=r"^input\.1\.call_id is 'c'; no message before called that") as refused:
        body.remember(kept)
    assert refused.value.param == "input.1.call_id"
    body = BODIES[RESPONSES].parse({"previous_response_id": "resp_1", "input": [OUTPUT | {"call_id": "a"}]})
    body.remember(kept)
    assert body.foreign_calls == {"previous_response_id": "f"}


def test_a_strict_server_refuses_calls_of_tools_that_are_not_offered(server: Running) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    bodies: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        (
            CHAT,
            {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]},
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "messages.1.tool_calls.0.function.name",
        ),
        (RESPONSES, {"instructions": "R", "input": [USER, CALL]}, {"tools": [FUNCTION]}, "input.1.name"),
        (
            MESSAGES,
            {"system": "R", "messages": [USER, {"role": "assistant", "content": [USE]}]},
            {"tools": [TOOL]},
            "messages.1.content.0.name",
        ),
    ]
    lenient = server.server.service.options
    for url, body, tools, name in bodies:
        body = LEAST[url] | body
        assert server.call(url, body)[0] == 200  # an agent may have taken over from one with other tools
        server.server.service.options = dataclasses.replace(lenient, strict=True)
        try:
            status, answer = server.call(url, body)
            other_tools = json.loads(json.dumps(tools).replace('"f"', '"g"'))
            others, _ = server.call(url, body | other_tools)
            # All that may be wrong with it now is the length of the prompt, which tells of tools
            _, known = server.call(url, body | tools)
        finally:
            server.server.service.options = lenient
        assert (status, others) == (400, 400)
        assert answer["error"]["message"].startswith(f"{name} is 'f', which is none of the tools")
        assert url == MESSAGES or answer["error"]["param"] == name
        assert name not in known.get("error", {}).get("message", "")
