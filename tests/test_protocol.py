"""OpenAI's bodies: what is accepted means what OpenAI says, what is not is refused by name."""

from __future__ import annotations

import json
import math

import pytest
from openai.types.chat import ChatCompletionMessage

from fake_llm import FakeLLM, expected_answer
from gossamer.errors import InvalidSamplingParamsError, PromptTooLongError, RequestError
from gossamer.outputs import CompletionOutput, Logprob, RequestOutput
from gossamer.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    error_body,
)

HELLO = [{"role": "user", "content": "Hello"}]


def complete(body: dict) -> dict:
    """A completion request, all the way through a fake engine."""
    llm = FakeLLM()
    request = CompletionRequest.parse(body)
    for index, prompt in enumerate(request.engine_prompts()):
        llm.engine.add_request(str(index), prompt, request.to_sampling_params())
    outputs = {}
    while llm.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.engine.step()}
    ordered = [outputs[str(index)] for index in range(len(request.prompt))]
    return request.answer(ordered, model=llm.model_name, decode=llm.tokenizer.decode)


def chat_output(*texts: str, logprobs: bool = False) -> RequestOutput:
    completions = [
        CompletionOutput(
            index,
            text,
            [ord(c) for c in text],
            logprobs=[{ord(c): Logprob(-0.25, 1, c)} for c in text] if logprobs else None,
            finish_reason="stop",
        )
        for index, text in enumerate(texts)
    ]
    return RequestOutput("r", None, [1, 2, 3], completions, num_cached_tokens=2)


@pytest.mark.parametrize(
    ("prompt", "normalised"),
    [
        ("Once", ["Once"]),
        (["Once", "upon"], ["Once", "upon"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_all_four_forms_of_prompt_are_read(prompt, normalised):
    assert CompletionRequest.parse({"prompt": prompt}).prompt == normalised


@pytest.mark.parametrize("prompt", [[], [[]], 5, None, ["a", 1], ["a", [1]], [True], [1.0], {"a": 1}, "\ud800"])
def test_a_prompt_of_any_other_form_is_refused(prompt):
    with pytest.raises(RequestError) as caught:
        CompletionRequest.parse({"prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("field", ["suffix", "background", "logit_biass", "temprature"])
def test_a_field_that_would_be_ignored_is_refused_by_name(field):
    with pytest.raises(RequestError, match=f"{field} is not supported") as caught:
        ChatCompletionRequest.parse({"messages": HELLO, field: 1})
    assert caught.value.param == field


def test_null_means_not_given():
    body = {"messages": HELLO, "temperature": None, "n": None, "tools": None, "stop": None, "max_tokens": None}
    params = ChatCompletionRequest.parse(body).to_sampling_params()
    assert (params.temperature, params.n, params.stop, params.max_tokens) == (1.0, 1, (), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"anything": None},
        {"stream": True, "stream_options": {"include_usage": None, "other": None}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"choice": ["a"], "regex": None, "grammar": None}},
        {"messages": [{"role": "user", "content": "Hello", "audio": None, "anything": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": None}]}]},
    ],
)
def test_null_means_not_given_in_any_object(fields):
    request = ChatCompletionRequest.parse({"messages": HELLO} | fields)
    assert request.chat_messages() == HELLO
    without = {name: value for name, value in fields.items() if value is not None}
    if "structured_outputs" in without:
        assert request.to_sampling_params().structured_outputs.to_dict() == {"choice": ["a"]}


def test_null_in_a_schema_is_a_value():
    schema = {"enum": [None, "a"], "default": None}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": None}}
    request = ChatCompletionRequest.parse({"messages": HELLO, "response_format": form})
    assert request.to_sampling_params().structured_outputs.json == schema


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "0.5"), ("n", 0), ("n", True), ("max_tokens", 1.5), ("stop", 3), ("stop", [1]), ("seed", "x")],
)
def test_values_of_the_wrong_type_are_refused_not_converted(field, value):
    with pytest.raises(RequestError) as caught:
        CompletionRequest.parse({"prompt": "x", field: value})
    assert caught.value.param.split(".")[0] == field


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("top_p", 2), ("logit_bias", {"x": 1})])
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(InvalidSamplingParamsError) as caught:
        CompletionRequest.parse({"prompt": "x", field: value}).to_sampling_params()
    assert caught.value.param == field


def test_every_field_reaches_the_sampler():
    fields = {
        "n": 2, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "top_k": 4, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True,
        "min_tokens": 2, "skip_special_tokens": False, "include_stop_str_in_output": True, "prompt_logprobs": 1,
        "logprobs": 2,
    }  # fmt: skip
    params = CompletionRequest.parse(
        {"prompt": "x", "stop": "\n", "stop_token_ids": [5], "logit_bias": {"8": 1}, "user": "me"} | fields
    ).to_sampling_params()
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("\n",), (5,), {8: 1.0})


def test_the_token_limit_is_the_bodys_then_the_users_then_openais():
    completion, chat = CompletionRequest.parse({"prompt": "x"}), ChatCompletionRequest.parse({"messages": HELLO})
    assert completion.to_sampling_params().max_tokens == 16
    assert chat.to_sampling_params().max_tokens is None
    assert completion.to_sampling_params(50).max_tokens == chat.to_sampling_params(50).max_tokens == 50
    given = ChatCompletionRequest.parse({"messages": HELLO, "max_completion_tokens": 3})
    assert given.to_sampling_params(50).max_tokens == 3
    with pytest.raises(RequestError, match="max_completion_tokens"):
        ChatCompletionRequest.parse({"messages": HELLO, "max_completion_tokens": 3, "max_tokens": 4})


def test_messages_in_parts_and_from_developers_become_what_templates_know():
    request = ChatCompletionRequest.parse(
        {
            "messages": [
                {"role": "developer", "content": "Be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "d", "name": "me", "type": "message"},
                {"role": "assistant", "content": "e", "annotations": [], "tool_calls": [], "reasoning_content": "f"},
                {"role": "assistant", "content": None, "refusal": "No."},
                {"role": "assistant", "content": None},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "g"}], "reasoning": "h"},
            ]
        }
    )
    assert request.chat_messages() == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d", "name": "me"},
        {"role": "assistant", "content": "e", "reasoning_content": "f"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "g", "reasoning_content": "h"},
    ]


def test_an_answer_of_openais_client_is_history():
    answer = ChatCompletionMessage(role="assistant", content="Four.").model_dump()
    request = ChatCompletionRequest.parse({"messages": [*HELLO, answer, *HELLO]})
    assert request.chat_messages() == [*HELLO, {"role": "assistant", "content": "Four."}, *HELLO]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a\udfff"}]}]},
            "messages.0.content.0.text",
        ),
        ({"stop": ["a", "\ud83d"]}, "stop.1"),
        ({"model": "\ud83d"}, "model"),
        ({"structured_outputs": {"json": {"const": "\ud83d"}}}, "structured_outputs.json.const"),
        ({"\ud83d": 1}, "a name in it"),
    ],
)
def test_a_lone_surrogate_is_named(fields, where):
    with pytest.raises(RequestError, match=r"lone surrogate \(U\+D") as caught:
        ChatCompletionRequest.parse({"messages": HELLO} | fields)
    assert caught.value.param == where
    json.dumps(error_body(caught.value), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "narrator", "content": "x"},
        {"role": "tool", "content": None},
        {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": [{"type": "text", "refusal": "x"}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "call"}]},
        {"role": "assistant", "content": "x", "type": "reasoning"},
        "hello",
    ],
)
def test_a_message_that_is_not_plain_text_is_refused(message):
    with pytest.raises(RequestError) as caught:
        ChatCompletionRequest.parse({"messages": [message]})
    assert caught.value.param.startswith("messages.0")


def test_choices_are_indexed_prompt_by_prompt_and_prompts_are_counted_once():
    body = complete({"prompt": ["abc", "defgh"], "n": 2, "max_tokens": 4})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    expected = [expected_answer(prompt, i)[:4] for prompt in ("abc", "defgh") for i in (0, 1)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 16,
        "total_tokens": 24,
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}


def test_completion_logprobs_line_up_with_the_text():
    choice = complete({"prompt": "abc", "max_tokens": 4, "logprobs": 1})["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [-1.0] * 4
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    # The chosen one has rank 2; it is there besides the most probable one.
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [[-0.5, -1.0]] * 4


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
def test_echo_puts_the_prompt_and_its_logprobs_first(prompt):
    choice = complete({"prompt": prompt, "max_tokens": 4, "logprobs": 2, "echo": True})["choices"][0]
    assert choice["text"] == "abc" + expected_answer("abc")[:4]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [None] + [-1.0] * 6
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 2


def test_prompt_logprobs_are_returned_only_when_asked_for():
    plain = complete({"prompt": "abc", "max_tokens": 1})["choices"][0]
    asked = complete({"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 0})["choices"][0]
    assert "prompt_logprobs" not in plain
    assert asked["prompt_logprobs"][0] is None
    assert asked["prompt_logprobs"][1] == {"98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"}}


def test_a_chat_answer_has_openais_shape():
    request = ChatCompletionRequest.parse({"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1})
    body = request.answer([chat_output("é", "ab", logprobs=True)], model="m", decode=str)
    assert body["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in body["choices"]] == ["é", "ab"]
    [entry] = body["choices"][0]["logprobs"]["content"]
    assert entry["bytes"] == [0xC3, 0xA9]
    assert entry["top_logprobs"] == [{"token": "é", "logprob": -0.25, "bytes": [0xC3, 0xA9]}]
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 3


def test_top_logprobs_needs_logprobs():
    with pytest.raises(RequestError, match="top_logprobs needs logprobs"):
        ChatCompletionRequest.parse({"messages": HELLO, "top_logprobs": 2})


def test_impossible_tokens_leave_the_body_valid_json():
    output = chat_output("a", logprobs=True)
    output.outputs[0].logprobs = [{97: Logprob(-math.inf, 9, "a")}]
    request = ChatCompletionRequest.parse({"messages": HELLO, "logprobs": True})
    assert json.dumps(request.answer([output], model="m", decode=str), allow_nan=False)


def test_an_error_body_names_field_and_kind():
    error = error_body(PromptTooLongError("too long", request_id="r", param="prompt"))["error"]
    assert error == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }


def test_a_prediction_is_a_text_or_parts_of_one() -> None:
    body = {"messages": [{"role": "user", "content": "Go on."}]}
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    for content in ("one, two", parts):
        request = ChatCompletionRequest.parse(body | {"prediction": {"type": "content", "content": content}})
        assert request.to_sampling_params().prediction == "one, two"
    assert ChatCompletionRequest.parse(body | {"speculation": False}).to_sampling_params().speculation is False
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    for wrong in ({"type": "content", "content": image}, {"type": "other", "content": "a"}, "a", {"type": "content"}):
        with pytest.raises(RequestError) as raised:
            ChatCompletionRequest.parse(body | {"prediction": wrong})
        assert str(raised.value.param).startswith("prediction")
