"""Responses that are kept: bounded, each key's own, and gone on from by id."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import RequestError, ResponseNotFoundError
from gossamer.protocol.custom_tools import InputReader, as_function, input_of
from gossamer.protocol.encoding import encode_json
from gossamer.protocol.model_responses import ResponsesRequest
from gossamer.protocol.response_store import ResponseStore
from running_server import MODEL, Running, make_chat_llm, running

TINY_CONTEXT = 512
ASK: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 4}


def response(number: int, text: str = "x") -> dict[str, Any]:
    return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "type": "message", "text": text}]}


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "delete"]), st.integers(0, 5), st.integers(1, 300))))
def test_the_store_is_bounded_and_drops_what_was_used_longest_ago(steps: list[tuple[str, int, int]]) -> None:
    store = ResponseStore(max_bytes=1000, max_responses=3)
    order: dict[str, int] = {}
    for kind, number, size in steps:
        id = f"resp_{number}"
        if kind == "put" and id not in order:
            store.put("me", response(number, "x" * size), [])
            order[id] = len(encode_json({"response": response(number, "x" * size), "items": []}))
            while sum(order.values()) > 1000 or len(order) > 3:
                del order[next(iter(order))]
        elif kind == "get" and id in order:
            assert store.get("me", id)["response"]["id"] == id
            order[id] = order.pop(id)
        elif kind == "delete" and id in order:
            store.delete("me", id)
            del order[id]
        assert len(store) == len(order) and store.bytes == sum(order.values())
        for other in {f"resp_{n}" for n in range(6)} - order.keys():
            with pytest.raises(ResponseNotFoundError):
                store.get("me", other)


def test_what_does_not_fit_is_not_kept_and_others_find_nothing() -> None:
    store = ResponseStore(max_bytes=200)
    store.of("me").keep(response(1), [])
    store.of("me").keep(response(2, "x" * 300), [])
    assert len(store) == 1 and store.of("me").item("msg_1")["type"] == "message"
    for look in (store.of("you").response, store.of("you").item, store.of("you").delete):
        with pytest.raises(ResponseNotFoundError):
            look("resp_1")
    empty = ResponseStore(max_bytes=0)
    empty.put("me", response(1), [])
    assert len(empty) == 0


def test_a_conversation_goes_on_by_id(server: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(input="One", instructions="Be brief.", **ASK)
    second = client.responses.create(input="Two", previous_response_id=first.id, **ASK)
    whole = client.responses.create(
        input=[{"role": "user", "content": "One"}, *first.output, {"role": "user", "content": "Two"}],  # type: ignore[list-item]  # output items are input items
        **ASK,
    )
    assert second.usage is not None and whole.usage is not None
    assert second.output_text == whole.output_text and second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id and second.store is True  # type: ignore[attr-defined]  # not in its model
    assert client.responses.retrieve(first.id).output_text == first.output_text
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in listed.data] == ["message"] * 3
    newest = client.responses.input_items.list(second.id, limit=1)
    assert newest.data[0].id == listed.data[-1].id and newest.has_more
    counted = client.responses.input_tokens.count(model=MODEL, input="Two", previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(input="Three", previous_response_id=first.id, **ASK)
    assert gone.value.code == "previous_response_not_found" and gone.value.param == "previous_response_id"
    third = client.responses.create(input="Three", previous_response_id=second.id, **ASK)
    assert third.status in ("completed", "incomplete")


def test_a_stream_is_kept_too_and_items_can_be_referred_to(server: Running, client: openai.OpenAI) -> None:
    events = list(client.responses.create(input="One", stream=True, **ASK))
    first = events[-1].response  # type: ignore[union-attr]  # the last event holds it
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    by_reference = client.responses.create(
        input=[{"role": "user", "content": "One"}, reference, {"role": "user", "content": "Two"}], **ASK
    )
    by_id = client.responses.create(input="Two", previous_response_id=first.id, **ASK)
    assert by_reference.output_text == by_id.output_text
    status, answer = server.call("/v1/responses", {"input": [{"type": "item_reference", "id": "msg_none"}]})
    assert status == 400 and "there is no response 'msg_none'" in answer["error"]["message"]


def test_nothing_is_kept_unless_it_may_be(server: Running, client: openai.OpenAI) -> None:
    answer = client.responses.create(input="One", store=False, **ASK)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    status, refused = server.call("/v1/responses/resp_x/input_items?limit=1000")
    assert status == 400 and refused["error"]["param"] == "limit"


def test_each_key_finds_its_own(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny), api_keys=("a", "b"), response_memory=0x10000) as server:
        mine, yours = (openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) for key in ("a", "b"))
        answer = mine.responses.create(input="One", **ASK)
        assert mine.responses.retrieve(answer.id).id == answer.id
        with pytest.raises(openai.NotFoundError):
            yours.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError):
            yours.responses.create(input="Two", previous_response_id=answer.id, **ASK)
        mine.close()
        yours.close()


def test_a_stream_that_breaks_ends_with_response_failed(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = server.llm.engine.runner.forward, iter(range(10_000))

    def fail(plan: Any) -> Any:
        if next(steps) > 3:
            raise RuntimeError("broken on purpose")
        time.sleep(0.05)  # so that the first events are on their way
        return forward(plan)

    monkeypatch.setattr(server.llm.engine.runner, "forward", fail)
    events = list(client.responses.create(input="One", stream=True, **ASK | {"max_output_tokens": 40}))
    assert events[-1].type == "response.failed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    failed = events[-1].response
    assert failed.status == "failed" and failed.error is not None and failed.error.code == "engine_error"
    monkeypatch.undo()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.id)


def test_thoughts_can_be_kept_by_the_client() -> None:
    body = ResponsesRequest.parse({"input": "Q", "include": ["reasoning.encrypted_content"]})
    item = body.writer().reasoning("rs_1", "Hm, é.")
    sent_back = {name: each for name, each in item.items() if name != "content"}
    turns = [{"role": "user", "content": "Q"}, sent_back, {"role": "assistant", "content": "A"}]
    messages = ResponsesRequest.parse({"input": turns}).chat.chat_messages()
    assert messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "Hm, é."}
    foreign = sent_back | {"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "S"}]}
    assert ResponsesRequest.parse({"input": [turns[0], foreign]}).chat.chat_messages()[1]["reasoning_content"] == "S"


PATCH = {"type": "custom", "name": "patch", "description": "Edits.", "format": {"type": "text"}}


def test_a_custom_tool_is_given_a_text(smollm2_path: Path) -> None:
    from gossamer import LLM

    pattern = {"type": "grammar", "syntax": "regex", "definition": "[a-z]{3,8}( [a-z]{3,8}){0,3}"}
    tools: list[Any] = [PATCH | {"format": pattern}]
    with running(lambda: LLM(smollm2_path, memory="256MiB", max_model_len=1024)) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        asked: dict[str, Any] = ASK | {"max_output_tokens": 60, "tools": tools}
        first = client.responses.create(input="Edit it.", tool_choice={"type": "custom", "name": "patch"}, **asked)
        (call,) = first.output
        assert call.type == "custom_tool_call" and call.name == "patch" and call.input.replace(" ", "").isalpha()
        with client.responses.stream(input="Edit it.", tool_choice="required", parallel_tool_calls=False, **asked) as s:
            events = list(s)
        text = "".join(event.delta for event in events if event.type == "response.custom_tool_call_input.delta")
        done: Any = next(event for event in events if event.type == "response.output_item.done")
        assert done.item.input == text == call.input
        result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
        second = client.responses.create(input=[result], previous_response_id=first.id, **asked)
        assert second.usage is not None and second.usage.input_tokens_details.cached_tokens > 0
        client.close()


@given(st.text(st.characters(codec="utf-8")), st.booleans(), st.integers(1, 7))
def test_the_text_of_a_custom_tool_is_read_from_any_pieces(text: str, ascii_only: bool, size: int) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    reader = InputReader()
    pieces = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    assert "".join(map(reader.push, pieces)) == text == input_of(arguments)
    assert text.startswith(input_of(arguments[: len(arguments) // 2]))


def test_a_grammar_that_is_not_enforced_is_told() -> None:
    lark = PATCH | {"format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}}
    body = ResponsesRequest.parse({"input": "Q", "tools": [lark, PATCH | {"name": "note"}, {"type": "local_shell"}]})
    assert body.ignored == ["tools.0.format", "tools.2"]
    assert 'start: "x"' in as_function(lark)["description"]
    with pytest.raises(RequestError, match="'no name'"):
        ResponsesRequest.parse({"input": "Q", "tools": [PATCH | {"name": "no name"}]})
