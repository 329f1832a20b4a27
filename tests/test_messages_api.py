"""``/v1/messages``: blocks in, blocks out, and events that Anthropic's own client can follow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema_rs
import pytest

from chat_templates import THINKING
from fake_llm import FakeLLM, chat_prompt, expected_answer
from gossamer import LLM
from gossamer.batch import BatchRunner
from gossamer.errors import RequestError
from gossamer.protocol.field_names import Conversation
from gossamer.protocol.message_blocks import read_turns, system_text
from gossamer.protocol.messages import MessagesRequest
from running_server import MODEL, Running, running

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"name": "weather", "description": "The weather of a city.", "input_schema": CITY},
    {"type": "web_search_20250305", "name": "web_search"},
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
ASKED: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 100, "extra_body": {"temperature": 0}}
PLAIN = {"model": MODEL, "messages": ASK, "max_tokens": 100}


def given(**fields: Any) -> dict[str, Any]:
    """Fields that the client has no arguments for, such as the temperature."""
    return {"extra_body": {"temperature": 0} | fields}


@pytest.fixture(scope="module")
def server(smollm2_server: Running) -> Running:
    return smollm2_server


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client of that server."""
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_question_and_its_answer(claude: anthropic.Anthropic) -> None:
    form = given(structured_outputs={"choice": ["sunny", "rainy"]})
    answer = claude.messages.create(**ASKED | form, system="Be brief.")
    (block,) = answer.content
    assert block.type == "text" and block.text in ("sunny", "rainy")
    assert (answer.stop_reason, answer.role, answer.type) == ("end_turn", "assistant", "message")
    cut = claude.messages.create(**ASKED | form | {"max_tokens": 1})
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 1
    again = claude.messages.create(**ASKED | form | {"max_tokens": 1})
    assert again.usage.cache_read_input_tokens and again.usage.input_tokens < cut.usage.input_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=ASK)
    assert counted.input_tokens == again.usage.cache_read_input_tokens + again.usage.input_tokens


def test_what_stopped_it_is_told(claude: anthropic.Anthropic) -> None:
    form = given(structured_outputs={"choice": ["one, two, three"]})
    answer = claude.messages.create(**ASKED | form, stop_sequences=["two"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "two")
    assert answer.content[0].type == "text" and answer.content[0].text == "one, "


def test_a_stream_is_followed_by_the_client(claude: anthropic.Anthropic) -> None:
    form = given(structured_outputs={"regex": "It is (sunny|rainy) in Paris today[.]"})
    whole = claude.messages.create(**ASKED | form)
    with claude.messages.stream(**ASKED | form) as stream:
        events = [event for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert final.content[0].type == whole.content[0].type == "text" and final.stop_reason == "end_turn"
    assert final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in events if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_calls_and_their_results_go_back_and_forth(
    claude: anthropic.Anthropic, streamed: bool, choice: dict[str, Any]
) -> None:
    tool_choice: Any = choice | {"disable_parallel_tool_use": True}
    if streamed:
        with claude.messages.stream(**ASKED, tools=TOOLS, tool_choice=tool_choice) as stream:
            first: Any = stream.get_final_message()
    else:
        first = claude.messages.create(**ASKED, tools=TOOLS, tool_choice=tool_choice)
    (call,) = first.content
    assert (call.type, call.name, first.stop_reason) == ("tool_use", "weather", "tool_use")
    jsonschema_rs.validate(CITY, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**ASKED | {"messages": turns, "max_tokens": 5}, tools=TOOLS)
    before = first.usage.input_tokens + first.usage.cache_read_input_tokens + first.usage.output_tokens
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= 0.9 * before


def test_a_schema_and_a_beginning(claude: anthropic.Anthropic, server: Running) -> None:
    schema = CITY | {"additionalProperties": False}
    answer: Any = claude.messages.create(**ASKED, output_config={"format": {"type": "json_schema", "schema": schema}})
    jsonschema_rs.validate(schema, json.loads(answer.content[0].text))
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    form = given(structured_outputs={"choice": [" sunny"]})
    answer = claude.messages.create(**ASKED | form | {"messages": begun})
    assert answer.content[0].text == " sunny"
    _, chat = server.call("/tokenize", {"messages": ASK})
    assert claude.messages.count_tokens(model=MODEL, messages=begun).input_tokens > chat["count"]


def test_thoughts_are_a_block_and_can_be_turned_off(smollm2_path: Path) -> None:
    def make() -> LLM:
        llm = LLM(smollm2_path, memory="256MiB", max_model_len=512)
        llm.tokenizer.chat_template = THINKING
        return llm

    with running(make) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        short = ASKED | {"max_tokens": 6}
        whole: Any = client.messages.create(**short)
        assert [block.type for block in whole.content] == ["thinking"]
        with client.messages.stream(**short) as stream:
            streamed: Any = stream.get_final_message()
        assert streamed.content[0].thinking == whole.content[0].thinking and streamed.content[0].signature == ""
        off: Any = client.messages.create(**short, thinking={"type": "disabled"})
        assert [block.type for block in off.content] == ["text"]
        client.close()


def test_errors_have_the_form_of_the_api(server: Running, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        claude.messages.create(**ASKED | given(temperature=-1))
    assert bad.value.body["type"] == "error" and bad.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]  # it is said to be any object
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**ASKED | {"model": "claude-none"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]  # as above
    status, answer = server.call("/v1/messages/nothing", {})
    assert (status, answer["type"]) == (404, "error")
    status, answer = server.call("/v1/responses", {})
    assert (status, answer["error"]["param"]) == (400, "input")


def test_a_key_may_come_in_either_header(tiny: Path) -> None:
    from running_server import make_chat_llm

    with running(lambda: make_chat_llm(tiny), api_keys=("sesame",)) as server:
        ask = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        for given in ({"api_key": "sesame"}, {"auth_token": "sesame"}):
            with anthropic.Anthropic(base_url=server.url, max_retries=0, **given) as client:
                assert client.messages.create(**ask).usage.output_tokens == 2  # type: ignore[call-overload]  # by name
        with anthropic.Anthropic(base_url=server.url, max_retries=0, api_key="simsim") as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                client.messages.create(**ask)  # type: ignore[call-overload]  # as above
            assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]  # any object


def test_what_breaks_within_a_stream_is_an_event(
    server: Running, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = server.llm.engine.runner.forward, iter(range(1000))

    def fail(plan: Any) -> Any:
        if next(steps) > 3:
            raise RuntimeError("broken on purpose")
        time.sleep(0.05)  # so that the first events are on their way
        return forward(plan)

    monkeypatch.setattr(server.llm.engine.runner, "forward", fail)
    with (
        pytest.raises(anthropic.APIStatusError, match="failed on this request"),
        claude.messages.stream(**ASKED) as stream,
    ):
        stream.get_final_message()


def test_the_line_that_counts_requests_is_left_out() -> None:
    heads = [f"x-anthropic-billing-header: cc_version=2; cch={n};" for n in range(2)]
    assert len({system_text([{"type": "text", "text": f"{head}\nRules"}]) for head in heads}) == 1
    assert system_text("Rules") == "Rules"


def test_blocks_become_messages_in_their_order() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "T", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"k": [1, "é"]}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "no", "is_error": True},
                {"type": "text", "text": "B"},
                {"type": "text", "text": "C"},
            ],
        },
    ]
    made = Conversation()
    read_turns(turns, made)
    _, answer, result, user = made.messages
    assert (answer["content"], answer["reasoning_content"]) == ("A", "T")
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"k": [1, "é"]}'}
    assert result == {"role": "tool", "tool_call_id": "a", "content": "Error: no"}
    assert user == {"role": "user", "content": "B\nC"}


def test_batch_files_may_hold_messages(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": ASK, "max_tokens": 8}
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/messages", "body": body}) + "\n")
    assert BatchRunner(source, output).run(FakeLLM()).completed == 1
    answer = json.loads(output.read_text())["response"]["body"]
    assert answer["content"] == [{"type": "text", "text": expected_answer(chat_prompt(ASK))[:8]}]
    assert answer["stop_reason"] == "max_tokens" and answer["usage"]["output_tokens"] == 8


def test_what_has_no_effect_is_told(server: Running) -> None:
    body = PLAIN | {"max_tokens": 1, "tools": TOOLS, "metadata": {"user_id": "u"}, "service_tier": "auto"}
    _, _, headers = server.raw("/v1/messages?beta=true", json.dumps(body).encode())
    assert headers["x-gossamer-ignored"] == "metadata, service_tier, tools.1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\.0\.content\.0: blocks of the"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role must be"),
        ({"messages": [{"role": "user"}]}, r"messages\.0\.content must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "no message before called that",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "a tool_use has an id"),
        ({"system": [{"type": "image"}]}, "system.0: blocks of the type 'image'"),
        ({"tools": [{"name": "a b", "input_schema": CITY}]}, "is no name of a function"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "fly"}}, "'fly', which is not among"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format must be"),
        ({"mcp_servers": [{"url": "http://localhost"}]}, "mcp_servers"),
        ({"n": 2}, "n must be 1"),
        ({"unknown": 1}, "unknown is not supported"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        MessagesRequest.parse(PLAIN | change)
