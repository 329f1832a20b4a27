"""The server as OpenAI's own client sees it: every field, whole and streamed, synchronous and not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from gossamer import LLM, SamplingParams
from running_server import MODEL, Running, make_chat_llm

TINY_CONTEXT = 512
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
PROMPT = "The quick brown fox jumps over the lazy dog"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def offline(tiny: Path) -> LLM:
    return make_chat_llm(tiny)


# What a client may ask for, beside the prompt; `extra` goes into extra_body.
CALLS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 12},
    {"seed": 3, "n": 3, "max_tokens": 8},
    {"seed": 3, "max_tokens": 40, "stop": ["a", "zz"]},
    {"seed": 5, "max_tokens": 12, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"seed": 5, "max_tokens": 12, "logit_bias": {"70": 5, "71": -100}},
    {"seed": 9, "max_tokens": 10, "user": "somebody"},
    {"seed": 9, "max_tokens": 10, "extra": {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2}},
    {"seed": 9, "max_tokens": 10, "extra": {"ignore_eos": True, "min_tokens": 4, "cache_salt": "mine"}},
    {"seed": 9, "max_tokens": 10, "extra": {"stop_token_ids": [80], "include_stop_str_in_output": True}},
    {"seed": 2, "max_tokens": 60, "extra": {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{4}"}}},
    {"seed": 2, "max_tokens": 60, "extra": {"structured_outputs": {"choice": ["yes", "no"]}}},
]
COMPLETIONS = [
    {"seed": 4, "max_tokens": 6, "logprobs": 3},
    {"seed": 4, "max_tokens": 6, "echo": True},
    {"seed": 4, "max_tokens": 6, "echo": True, "logprobs": 2},
    {"seed": 4, "max_tokens": 6, "n": 2, "logprobs": 0, "extra": {"skip_special_tokens": False}},
]
CHATS = [
    {"seed": 4, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 4},
    {"seed": 4, "max_tokens": 6, "logprobs": True},
    {"seed": 4, "max_tokens": 90, "response_format": {"type": "json_object"}},
    {"seed": 4, "max_tokens": 90, "response_format": {"type": "text"}},
    {
        "seed": 4,
        "max_tokens": 90,
        "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}},
    },
]


def split(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in call.items() if k != "extra"} | {"extra_body": call.get("extra")}


@pytest.mark.parametrize("call", CALLS + COMPLETIONS, ids=json.dumps)
def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, call: dict[str, Any]) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, **split(call))
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **split(call)
    )
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    offsets: dict[int, list[int]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
        usage = chunk.usage
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    for choice in whole.choices:
        if call.get("logprobs") is not None:
            assert tokens[choice.index] == choice.logprobs.tokens
            assert offsets[choice.index] == choice.logprobs.text_offset
    assert whole.usage.prompt_tokens == usage.prompt_tokens == len(PROMPT)
    assert whole.usage.completion_tokens == usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("call", CALLS + CHATS, ids=json.dumps)
def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI, call: dict[str, Any]) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, **split(call))

    async def streamed() -> tuple[dict[int, str], dict[int, list[float]], Any]:
        texts: dict[int, str] = {}
        logprobs: dict[int, list[float]] = {}
        url = str(client.base_url)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as other:
            stream = await other.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}, **split(call)
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                    if choice.logprobs is not None:
                        logprobs.setdefault(choice.index, []).extend(t.logprob for t in choice.logprobs.content)
        return texts, logprobs, chunk.usage

    texts, logprobs, usage = asyncio.run(streamed())
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        if call.get("logprobs"):
            expected = [each.logprob for each in choice.logprobs.content]
            assert logprobs[choice.index] == pytest.approx(expected, abs=1e-4)
            for each in choice.logprobs.content:  # the chosen token may be one more
                texts = [other.token for other in each.top_logprobs]
                count = call.get("top_logprobs", 0)
                assert len(texts) in (count, count + (count > 0))
                assert each.token in texts or not count


def test_answers_are_those_of_the_engine(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    (expected,) = offline.chat(HELLO, params, use_tqdm=False)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == expected.outputs[0].text
    prompts = [PROMPT, PROMPT[:20] + "!", "x"]
    outputs = offline.generate(prompts, params, use_tqdm=False)
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=20)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in outputs]
    ids = [output.prompt_token_ids for output in outputs]
    answer = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=20)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in outputs]


def test_several_prompts_may_be_streamed_at_once(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "one", "two two"]
    options = {"model": MODEL, "prompt": prompts, "n": 2, "seed": 1, "max_tokens": 7}
    whole = client.completions.create(**options)
    texts = [""] * 6
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_json_is_valid_under_the_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    for seed in range(8):
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, seed=seed, max_tokens=200, response_format=form
        )
        if answer.choices[0].finish_reason == "stop":
            thing = json.loads(answer.choices[0].message.content)
            assert set(thing) == {"name", "size"} and len(thing["name"]) <= 4 and thing["size"] <= 99


def test_best_of_returns_the_most_probable(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "seed": 6, "max_tokens": 6, "logprobs": 0}
    many = client.completions.create(n=5, **options)
    best = client.completions.create(n=2, best_of=5, **options)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = sorted(many.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert best.usage.completion_tokens == many.usage.completion_tokens  # all of them were generated


def test_the_models_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.param == "model" and "gpt-4" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "temperatur": 1}, "temperatur"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, None),
        ({"prompt": "x", "n": 3, "best_of": 2}, None),
        ({"prompt": "x", "n": 100_000}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5, 999_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str | None, stream: bool) -> None:
    if stream and "stream_options" in body:
        return  # that is right
    status, answer = server.call("/v1/completions", body | ({"stream": True} if stream else {}))
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert param is None or answer["error"]["param"].split(".")[0] == param
    assert answer["error"]["message"]


def test_a_response_format_is_refused_under_its_own_name(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    status, answer = server.call("/v1/chat/completions", {"messages": HELLO, "response_format": form})
    assert status == 400 and answer["error"]["param"] == "response_format"


def test_a_long_conversation_is_refused_as_messages(server: Running) -> None:
    status, answer = server.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]})
    assert status == 400 and answer["error"]["param"] == "messages"
    assert answer["error"]["code"] == "context_length_exceeded"


def test_tokens_there_and_back(server: Running) -> None:
    text = "Grüße, 世界!"
    status, answer = server.call("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200 and answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == len(text.encode())
    status, back = server.call("/detokenize", {"tokens": answer["tokens"]})
    assert status == 200 and back == {"prompt": text}
    _, chat = server.call("/tokenize", {"messages": HELLO})
    _, back = server.call("/detokenize", {"tokens": chat["tokens"]})
    assert back["prompt"] == "<user>Hello, who are you?\n<assistant>"
    _, developer = server.call("/tokenize", {"messages": [{"role": "developer", "content": "Be brief."}]})
    assert server.call("/detokenize", {"tokens": developer["tokens"]})[1]["prompt"].startswith("<system>")
    for body, param in (({}, "prompt"), ({"prompt": "x", "messages": HELLO}, "prompt"), ({"prompt": 5}, "prompt")):
        status, answer = server.call("/tokenize", body)
        assert status == 400 and answer["error"]["param"] == param
    status, answer = server.call("/detokenize", {"tokens": [10**9]})
    assert status == 400 and answer["error"]["param"] == "tokens"


def test_cached_tokens_are_reported(server: Running) -> None:
    prompt = "~ prefix that nobody has used before. " * 4
    first = server.call("/v1/completions", {"prompt": prompt + "one", "max_tokens": 2})[1]
    second = server.call("/v1/completions", {"prompt": prompt + "two", "max_tokens": 2})[1]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - 1


def test_a_salt_keeps_its_cache_to_itself(server: Running) -> None:
    prompt = "$ecrets are worth asking for. " * 6

    def cached(salt: str | None) -> int:
        body = {"prompt": prompt, "max_tokens": 2} | ({} if salt is None else {"cache_salt": salt})
        return server.call("/v1/completions", body)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("b"), cached(None), cached("c")] == [0, 0, 0, 0]
    assert cached("a") > 100 and cached("b") > 100 and cached(None) > 100


def test_version_health_and_metrics(server: Running) -> None:
    import gossamer

    assert server.call("/version") == (200, {"version": gossamer.__version__})
    assert server.call("/health") == (200, {"status": "ready"})
    server.call("/v1/completions", {"prompt": PROMPT, "max_tokens": 3})
    status, text, headers = server.raw("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    label = f'{{model_name="{MODEL}"}}'
    assert float(values[f"gossamer:generation_tokens_total{label}"]) >= 3
    assert float(values[f"gossamer:time_to_first_token_seconds_count{label}"]) >= 1
    assert float(values[f"gossamer:inter_token_latency_seconds_count{label}"]) >= 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_tokens_saved_total"):
        assert f"gossamer:{name}{label}" in values


def test_prefixes_are_pinned_shown_and_let_go(server: Running) -> None:
    system = [{"role": "system", "content": "You answer in the voice of a very old tree. " * 3}]
    status, prefix = server.call("/v1/prefixes", {"messages": system, "name": "tree"})
    assert status == 200 and prefix["name"] == "tree" and prefix["tokens"] > 100
    assert server.call("/v1/prefixes", {"messages": system}) == (200, prefix)  # once is enough
    _, picture = server.call("/v1/prefixes")
    assert picture["data"] == [prefix] and any(node["pinned"] for node in picture["nodes"])
    assert picture["kv_bytes"] == sum(node["bytes"] for node in picture["nodes"])
    answer = server.call("/v1/chat/completions", {"messages": system + HELLO, "max_tokens": 2})[1]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= prefix["tokens"]
    status, gone = server.call(f"/v1/prefixes/{prefix['id']}", method="DELETE")
    assert status == 200 and gone["deleted"]
    assert server.call(f"/v1/prefixes/{prefix['id']}", method="DELETE")[0] == 404
    assert server.call("/v1/prefixes")[1]["data"] == []
    assert server.call("/v1/prefixes", {})[0] == 400
