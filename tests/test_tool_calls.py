"""Calls of functions over the API, with a real model: always valid, streamed as clients read it, kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from gossamer import LLM, RequestError, SamplingParams, StructuredOutputsParams, Tool, ToolUse
from gossamer.batch import BatchRunner
from running_server import MODEL, Running

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["city"],
}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": ADD}},
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
BODY = {"messages": ASK, "tools": TOOLS, "temperature": 0, "max_tokens": 100}


@pytest.fixture(scope="module")
def server(smollm2_server: Running) -> Running:
    return smollm2_server


def valid(call: Any) -> None:
    schema = {"weather": WEATHER, "add": ADD}[call.function.name]
    jsonschema_rs.validate(schema, json.loads(call.function.arguments))


def test_a_required_call_is_valid_and_its_result_goes_on(server: Running, client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
    call: Any = choice.message.tool_calls[0]
    valid(call)
    answer = choice.message.model_dump()
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 C"}
    second = client.chat.completions.create(
        model=MODEL, messages=[*ASK, answer, result], tools=TOOLS, temperature=0, max_tokens=8
    )
    assert first.usage is not None and second.usage is not None and second.usage.prompt_tokens_details is not None
    # What the model spells in other tokens than the tokenizer would is computed again: '"}' '}' here, for '"' '}}'.
    assert second.usage.prompt_tokens_details.cached_tokens >= 0.97 * first.usage.total_tokens


def test_the_function_that_is_named_is_called_once(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "add"}}
    for temperature in (0, 2):
        answer = client.chat.completions.create(
            model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, temperature=temperature, max_tokens=200, seed=3
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.function.name == "add"
        if answer.choices[0].finish_reason == "tool_calls":
            valid(call)


def test_some_functions_may_be_allowed(server: Running) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    body = BODY | {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    status, answer = server.call("/v1/chat/completions", body)
    assert status == 200
    assert {call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]} == {"add"}


def test_without_a_choice_of_tools_there_is_text(server: Running) -> None:
    for choice in ("auto", "none"):
        status, answer = server.call("/v1/chat/completions", BODY | {"tool_choice": choice, "max_tokens": 20})
        message = answer["choices"][0]["message"]
        assert status == 200 and message["content"] and "tool_calls" not in message


def test_a_stream_says_the_same_as_the_whole_answer(server: Running, client: openai.OpenAI) -> None:
    body = BODY | {"tool_choice": "required", "n": 2, "seed": 5, "temperature": 1, "max_tokens": 60}
    whole = server.call("/v1/chat/completions", body)[1]["choices"]
    events = server.events("/v1/chat/completions", body)
    streamed: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in events:
        for choice in event["choices"]:
            for part in choice["delta"].get("tool_calls", ()):
                calls = streamed[choice["index"]]
                if part["index"] == len(calls):
                    assert part["type"] == "function" and part["id"].startswith("call_")
                    assert part["function"]["arguments"] == ""
                    calls.append({"name": part["function"]["name"], "arguments": ""})
                else:
                    assert part["index"] == len(calls) - 1 and part.keys() == {"index", "function"}
                    calls[-1]["arguments"] += part["function"]["arguments"]
    for choice in whole:
        functions = [call["function"] for call in choice["message"]["tool_calls"]]
        assert functions == streamed[choice["index"]]
    assert [event["choices"][0]["finish_reason"] for event in events].count("length") <= 2
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required", temperature=0, parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls" and len(final.choices[0].message.tool_calls or ()) == 1


def test_logprobs_of_a_call_are_those_of_its_tokens(server: Running) -> None:
    body = BODY | {"tool_choice": "required", "logprobs": True, "parallel_tool_calls": False}
    whole = server.call("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]
    text = "".join(each["token"] for each in whole)
    assert text.startswith('<tool_call>\n{"name": "') and text.endswith("}\n</tool_call>")
    events = server.events("/v1/chat/completions", body)
    told = [
        each
        for event in events
        for choice in event["choices"]
        for each in (choice.get("logprobs") or {}).get("content", ())
    ]
    assert [each["token"] for each in told] == [each["token"] for each in whole]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "two functions have the name 'weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "is no name of a function"),
        ({"tools": [{"type": "function"}]}, "needs the field function"),
        ({"tool_choice": {"type": "function", "function": {"name": "zz"}}}, "'zz', which is not among the tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice must be"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "no message before called that"),
        ({"chat_template_kwargs": {"tools": []}}, "tools is no variable of a template that can be given"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template is no variable"),
        ({"structured_outputs": {"regex": "a"}}, "tools go with a JSON Schema"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Running, change: dict[str, Any], reason: str) -> None:
    status, answer = server.call("/v1/chat/completions", BODY | change)
    assert status == 400 and reason in answer["error"]["message"]


@pytest.mark.parametrize(
    ("parameters", "strict", "reason"),
    [
        ({"type": "object", "properties": {"x": {"type": "nonsense"}}}, False, "are no JSON Schema"),
        ({"type": "object", "properties": {"x": False}, "required": ["x"]}, False, "Unsatisfiable"),
        ({"type": "object", "properties": {"x": {"type": "string", "pattern": "(?<=a)b"}}}, True, "look-around"),
        ({"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}, True, "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    server: Running, parameters: dict[str, Any], strict: bool, reason: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
    status, answer = server.call("/v1/chat/completions", BODY | {"tools": [tool], "tool_choice": "required"})
    assert status == 400 and reason in answer["error"]["message"] and answer["error"]["param"].startswith("tools")


def test_what_cannot_be_enforced_is_left_out_unless_strict(server: Running) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": "(?<=a)b", "maxLength": 5}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    status, answer = server.call("/v1/chat/completions", BODY | {"tools": [tool], "tool_choice": "required"})
    assert status == 200 and answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_fields_without_an_effect_are_named_in_a_header(server: Running) -> None:
    given = {
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "verbosity": "low",
    }
    tools = [*TOOLS, {"type": "web_search", "search_context_size": "low"}]
    for stream in (False, True):
        body = json.dumps(BODY | given | {"tools": tools, "stream": stream, "max_tokens": 2}).encode()
        status, _, headers = server.raw("/v1/chat/completions", body)
        assert status == 200
        named = set(headers["x-gossamer-ignored"].split(", "))
        assert named == {*given, "tools.2"}
        assert "system message" in headers["x-gossamer-tools"]
    _, _, headers = server.raw("/v1/chat/completions", json.dumps(BODY | {"max_tokens": 2}).encode())
    assert headers["x-gossamer-ignored"] is None


def test_first_names_of_tools_are_understood(server: Running) -> None:
    body = {key: each for key, each in BODY.items() if key != "tools"}
    body |= {"functions": [tool["function"] for tool in TOOLS], "function_call": {"name": "add"}}
    status, answer = server.call("/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "add"


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, memory="256MiB", max_model_len=1024) as llm:
        yield llm


def test_python_calls_tools(smollm2: LLM) -> None:
    tools = [Tool("weather", WEATHER), Tool("add", ADD)]
    params = SamplingParams(temperature=1, seed=2, max_tokens=200)
    use = ToolUse(tools, required=True, parallel=False)
    for output in smollm2.chat([ASK] * 4, params, use_tqdm=False, tools=use):
        (completion,) = output.outputs
        (call,) = completion.answer.calls
        if completion.finish_reason == "stop":
            jsonschema_rs.validate({"weather": WEATHER, "add": ADD}[call.name], json.loads(call.arguments))
    (plain,) = smollm2.chat(ASK, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert plain.outputs[0].answer.content == plain.outputs[0].text != ""
    with pytest.raises(RequestError, match="cannot both be given"):
        form = StructuredOutputsParams(regex="a")
        smollm2.chat(ASK, SamplingParams(structured_outputs=form), use_tqdm=False, tools=tools)


def test_batches_call_tools_as_well(smollm2: LLM, tmp_path: Path) -> None:
    body = BODY | {"tool_choice": "required", "parallel_tool_calls": False}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    summary = BatchRunner(tmp_path / "in.jsonl", tmp_path / "out.jsonl").run(smollm2)
    assert summary.completed == 1
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    (call,) = answer["response"]["body"]["choices"][0]["message"]["tool_calls"]
    jsonschema_rs.validate(
        {"weather": WEATHER, "add": ADD}[call["function"]["name"]], json.loads(call["function"]["arguments"])
    )


# --- fields of vLLM that agents and evaluations send -----------------------------------------------------------------


def test_an_answer_may_go_on_with_the_last_message(server: Running) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The weather in Paris is sunny and"}]
    given = {"messages": begun, "temperature": 0, "max_tokens": 8, "continue_final_message": True}
    status, answer = server.call("/v1/chat/completions", given | {"return_token_ids": True})
    assert status == 200
    prompt = server.llm.tokenizer.decode(answer["prompt_token_ids"])
    assert prompt.endswith("The weather in Paris is sunny and")
    ids = answer["choices"][0]["token_ids"]
    assert server.llm.tokenizer.decode(ids) == answer["choices"][0]["message"]["content"]
    for change, reason in (
        ({"add_generation_prompt": True}, "add_generation_prompt must be false"),
        ({"messages": ASK}, "needs an assistant's message"),
    ):
        status, answer = server.call("/v1/chat/completions", given | change)
        assert status == 400 and reason in answer["error"]["message"]


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_token_ids_and_usage_come_with_every_event(server: Running, url: str) -> None:
    prompt = {"messages": ASK} if "chat" in url else {"prompt": "Once upon a time"}
    body = {**prompt, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    status, whole = server.call(url, body)
    assert status == 200
    events = server.events(url, body | {"stream_options": {"continuous_usage_stats": True, "include_usage": True}})
    choices = [choice for event in events for choice in event["choices"]]
    assert [token for choice in choices for token in choice.get("token_ids", ())] == whole["choices"][0]["token_ids"]
    asked = whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"]
    assert choices[0]["prompt_token_ids"] == asked and all("prompt_token_ids" not in each for each in choices[1:])
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 12 and all(event["usage"]["total_tokens"] for event in events)


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_prompts_may_be_cut_to_their_last_tokens(server: Running, url: str) -> None:
    prompt = {"messages": ASK} if "chat" in url else {"prompt": "Once upon a time there was a lighthouse"}
    body = {**prompt, "temperature": 0, "max_tokens": 2, "return_token_ids": True}
    ids = []
    for cut in ({}, {"truncate_prompt_tokens": 4}, {"truncate_prompt_tokens": 4000}):
        _, answer = server.call(url, body | cut)
        ids.append(answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"])
    assert ids == [ids[0], ids[0][-4:], ids[0]] and len(ids[0]) > 4


def test_the_tokenizer_is_described(server: Running) -> None:
    status, answer = server.call("/tokenizer_info")
    assert status == 200 and answer["eos_token"] == "<|im_end|>" and "im_start" in answer["chat_template"]


def test_tools_are_part_of_what_is_pinned_and_counted(server: Running) -> None:
    messages = [{"role": "system", "content": "Be brief, and use the tools that you were given."}]
    status, pinned = server.call("/v1/prefixes", {"messages": messages, "tools": TOOLS})
    assert status == 200
    status, counted = server.call("/tokenize", {"messages": [*messages, *ASK], "tools": TOOLS})
    assert status == 200 and counted["count"] > pinned["tokens"] > 100
    body = BODY | {"messages": [*messages, *ASK], "max_tokens": 2}
    usage = server.call("/v1/chat/completions", body)[1]["usage"]
    assert usage["prompt_tokens"] == counted["count"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= pinned["tokens"]
    assert server.call(f"/v1/prefixes/{pinned['id']}", method="DELETE")[0] == 200
    status, answer = server.call(
        "/tokenize", {"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "y"}]}
    )
    assert status == 400 and "no message before called that" in answer["error"]["message"]
