"""``/v1/responses``: items in, items out, and events that OpenAI's own client can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from chat_templates import THINKING
from gossamer import LLM
from gossamer.batch import BatchRunner
from gossamer.errors import RequestError
from gossamer.protocol.field_names import Conversation
from gossamer.protocol.model_responses import ResponsesRequest
from gossamer.protocol.response_items import read_items
from running_server import MODEL, Running, running

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": CITY,
        "strict": False,
    },
    {"type": "web_search"},
]
ASK = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def server(smollm2_server: Running) -> Running:
    return smollm2_server


def test_a_question_and_its_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": ASK, "temperature": 0, "store": False}
    form = {"structured_outputs": {"choice": ["sunny", "rainy"]}}
    response = client.responses.create(**asked, extra_body=form)
    assert response.status == "completed" and response.output_text in ("sunny", "rainy")
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.temperature, response.top_p) == (0, 0.9)  # as asked for, and as the model's authors advise
    cut = client.responses.create(**asked, max_output_tokens=1, extra_body=form)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert [item.status for item in cut.output if item.type == "message"] == ["incomplete"]
    assert cut.incomplete_details.reason == "max_output_tokens" and response.output_text.startswith(cut.output_text)


def test_a_stream_is_followed_by_the_client(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": ASK, "temperature": 0}
    form = {"structured_outputs": {"regex": "It is (sunny|rainy) in Paris today[.]"}}
    whole = client.responses.create(**asked, extra_body=form)
    with client.responses.stream(**asked, extra_body=form) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and final.status == "completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    with client.responses.stream(**asked, max_output_tokens=2, extra_body=form) as stream:
        last: Any = list(stream)[-1]
        assert last.type == "response.incomplete" and last.response.output[-1].status == "incomplete"


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_and_their_results_go_back_and_forth(client: openai.OpenAI, streamed: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0, "instructions": "Use the tools."}
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]
    first_asked = asked | {"tool_choice": "required", "parallel_tool_calls": False}
    if streamed:
        with client.responses.stream(input=given, **first_asked) as stream:
            response: Any = stream.get_final_response()
    else:
        response = client.responses.create(input=given, **first_asked)
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed") and call.id != call.call_id
    jsonschema_rs.validate(CITY, json.loads(call.arguments))
    given += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second: Any = client.responses.create(input=given, max_output_tokens=5, **asked)
    assert second.output[0].type in ("message", "function_call")
    assert second.usage.input_tokens_details.cached_tokens >= 0.9 * response.usage.total_tokens


def test_the_function_that_is_named_and_a_schema(server: Running) -> None:
    body = {"input": ASK, "temperature": 0, "max_output_tokens": 400}
    named = body | {"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}}
    status, answer = server.call("/v1/responses", named)
    assert status == 200 and [item["type"] for item in answer["output"]] == ["function_call"]
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY | {"additionalProperties": False}}}
    status, answer = server.call("/v1/responses", body | {"text": form})
    (message,) = answer["output"]
    jsonschema_rs.validate(CITY, json.loads(message["content"][0]["text"]))
    _, _, headers = server.raw("/v1/responses", json.dumps(named | {"store": False, "service_tier": "auto"}).encode())
    assert headers["x-gossamer-ignored"] == "service_tier, tools.1"


def test_logprobs_are_those_of_the_text(server: Running) -> None:
    body = {"input": ASK, "temperature": 0, "max_output_tokens": 5, "include": ["message.output_text.logprobs"]}
    (message,) = server.call("/v1/responses", body | {"top_logprobs": 2})[1]["output"]
    part = message["content"][0]
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
    assert all(len(each["top_logprobs"]) >= 2 for each in part["logprobs"])


def test_thoughts_are_an_item(smollm2_path: Path) -> None:
    def make() -> LLM:
        llm = LLM(smollm2_path, memory="256MiB", max_model_len=512)
        llm.tokenizer.chat_template = THINKING
        return llm

    with running(make) as server:
        body = {"input": ASK, "temperature": 0, "max_output_tokens": 6}
        status, answer = server.call("/v1/responses", body)
        assert status == 200 and answer["output"][0]["type"] == "reasoning"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client.responses.stream(model=MODEL, input=ASK, temperature=0, max_output_tokens=6) as stream:
            last: Any = list(stream)[-1]
        assert last.response.output[0].content[0].text == answer["output"][0]["content"][0]["text"]
        status, answer = server.call("/v1/responses", body | {"reasoning": {"effort": "none"}})
        assert [item["type"] for item in answer["output"]] == ["message"]


def test_what_one_answer_is_made_of_is_one_message() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "Q"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A", "annotations": []}]},
        call,
        call | {"call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "message", "role": "assistant", "content": "B"},
        {"type": "message", "role": "assistant", "content": "C"},
    ]
    made = Conversation()
    read_items(items, [f"input.{place}" for place in range(len(items))], made)
    messages = made.messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant", "assistant"]
    answer = messages[1]
    assert (answer["content"], answer["reasoning_content"]) == ("A", "T")
    assert [each["id"] for each in answer["tool_calls"]] == ["a", "b"]
    assert messages[2]["content"] == "1"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "input is missing"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "references to items need a server"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0: items of the type 'computer_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image' is not supported"),
        ({"input": [{"role": "user"}, {"type": "function_call", "call_id": "a"}]}, r"input\.1\.name must be a string"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "no message before called that"),
        ({"input": "x", "previous_response_id": "resp_1"}, "need a server that keeps responses"),
        ({"input": "x", "background": True}, "background is not supported"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "n": 2}, "n must be 1"),
        ({"input": "x", "tools": [{"type": "function", "name": "a b"}]}, "is no name of a function"),
        ({"input": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        _ = ResponsesRequest.parse(body).chat


def test_batch_files_may_hold_responses(smollm2_path: Path, tmp_path: Path) -> None:
    body = {"input": ASK, "temperature": 0, "max_output_tokens": 4}
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}) + "\n"
    )
    with LLM(smollm2_path, memory="256MiB", max_model_len=512) as llm:
        summary = BatchRunner(tmp_path / "in.jsonl", tmp_path / "out.jsonl").run(llm)
    assert summary.completed == 1 and summary.completion_tokens == 4 and summary.prompt_tokens > 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]
    assert answer["object"] == "response" and answer["output"][0]["content"][0]["text"]
