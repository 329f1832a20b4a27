"""A new endpoint is one body class in the table: the server, streams and batch files take it as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from fake_llm import FakeLLM, expected_answer
from gossamer.batch import BatchRunner
from gossamer.chat import ChatFormat
from gossamer.outputs import RequestOutput
from gossamer.protocol import BODIES, GeneratingBody
from gossamer.protocol.responses import Decode, Json, envelope, new_head
from gossamer.protocol.streaming import News, StreamedAnswer
from running_server import Running


class ShoutRequest(GeneratingBody):
    """Body of an endpoint that goes on in capitals."""

    url: ClassVar[str] = "/v1/shouts"
    description: ClassVar[str] = "Go on, loudly."
    prompt_field: ClassVar[str] = "words"

    words: list[str]

    def engine_prompts(self) -> list[Json]:
        return [{"prompt": " ".join(self.words), "cache_salt": self.cache_salt}]

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        choices = [{"shout": completion.text.upper()} for completion in outputs[0].outputs]
        return envelope(new_head("shout", "shout", model), choices, outputs)

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return ShoutEvents(new_head("shout", "shout.chunk", model), n=self.n, include_usage=self.include_usage)

    def _logprob_count(self) -> int | None:
        return None


class ShoutEvents(StreamedAnswer):
    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        yield {"index": index, "shout": news.text.upper()}


@pytest.fixture(scope="module", autouse=True)
def listed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BODIES, ShoutRequest.url, ShoutRequest)
        yield


BODY = {"words": ["The", "sun", "is"], "max_tokens": 6, "temperature": 0}


def completion(server: Running) -> str:
    body = {"prompt": "The sun is", "max_tokens": 6, "temperature": 0}
    text: str = server.call("/v1/completions", body)[1]["choices"][0]["text"]
    return text


def test_it_is_answered_and_streamed(server: Running) -> None:
    status, answer = server.call("/v1/shouts", BODY)
    assert (status, answer["object"], answer["usage"]["completion_tokens"]) == (200, "shout", 6)
    assert answer["choices"] == [{"shout": completion(server).upper()}]
    *events, last = server.events("/v1/shouts", BODY | {"stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["shout"] for event in events) == completion(server).upper()
    assert last["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "param"), [({"words": [""]}, "words"), ({"words": None}, "words"), ({"volume": 11}, "volume")]
)
def test_it_refuses_by_its_own_fields(server: Running, stream: bool, wrong: Json, param: str) -> None:
    status, answer = server.call("/v1/shouts", BODY | wrong | {"stream": stream})
    assert (status, answer["error"]["param"]) == (400, param)


def test_the_openapi_document_has_it(server: Running) -> None:
    operation = server.call("/openapi.json")[1]["paths"]["/v1/shouts"]["post"]
    assert (operation["summary"], operation["description"]) == ("Shouts", ShoutRequest.description)
    assert "words" in operation["requestBody"]["content"]["application/json"]["schema"]["properties"]


def test_batch_files_may_name_it(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"words": ["a", "b"], "max_tokens": 4}, {"words": ["x" * 500]}]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/shouts", "body": body} for i, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = BatchRunner(source, output).run(FakeLLM())
    assert (summary.completed, summary.failed) == (1, 1)
    by_id = {record["custom_id"]: record["response"] for record in map(json.loads, output.read_text().splitlines())}
    assert by_id["0"]["body"]["choices"] == [{"shout": expected_answer("a b")[:4].upper()}]
    assert (by_id["1"]["status_code"], by_id["1"]["body"]["error"]["param"]) == (400, "words")
