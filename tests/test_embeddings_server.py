"""The server and batches of a model of embeddings: openai's client, rerank, score, refusals, and many at a time."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from typer.testing import CliRunner

from encoders import LONGEST, TEXTS, write_bert, write_cross_encoder
from gossamer import LLM
from gossamer.batch import BatchRunner
from gossamer.cli.app import app
from gossamer.protocol.pooling import MAX_INPUTS
from running_server import MODEL, Running, running, wait_for


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def server(bert: Path) -> Iterator[Running]:
    with running(lambda: LLM(bert)) as server:
        yield server


@pytest.fixture(scope="module")
def vectors(bert: Path) -> dict[str, np.ndarray]:
    """What the Python API makes of the texts."""
    outputs = LLM(bert).embed(TEXTS)
    return {text: output.embedding for text, output in zip(TEXTS, outputs, strict=True)}


class TestEmbeddings:
    @pytest.mark.parametrize("format", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
    def test_openais_client(self, client: openai.OpenAI, vectors: dict[str, np.ndarray], format: Any) -> None:
        answer = client.embeddings.create(model=MODEL, input=TEXTS, **format)
        assert (answer.object, answer.model) == ("list", MODEL)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text) + 2 for text in TEXTS)
        assert [each.index for each in answer.data] == list(range(len(TEXTS)))
        for text, each in zip(TEXTS, answer.data, strict=True):
            found: Any = each.embedding
            if format.get("encoding_format") == "base64":
                found = np.frombuffer(base64.b64decode(found), "<f4")
            np.testing.assert_allclose(found, vectors[text], atol=1e-6)

    @pytest.mark.parametrize("form", ["text", "ids", "many ids"])
    def test_forms_of_the_input(self, server: Running, vectors: dict[str, np.ndarray], form: str) -> None:
        ids = server.call("/tokenize", {"prompt": "a cat"})[1]["tokens"]
        given = {"text": "a cat", "ids": ids, "many ids": [ids]}[form]
        status, answer = server.call("/v1/embeddings", {"input": given})
        assert status == 200 and len(answer["data"]) == 1
        np.testing.assert_allclose(answer["data"][0]["embedding"], vectors["a cat"], atol=1e-6)

    def test_dimensions_and_length(self, server: Running, vectors: dict[str, np.ndarray]) -> None:
        def ask(**fields: Any) -> np.ndarray:
            return np.array(server.call("/v1/embeddings", {"input": "dog"} | fields)[1]["data"][0]["embedding"])

        expected = vectors["dog"][:7] / np.linalg.norm(vectors["dog"][:7])
        np.testing.assert_allclose(ask(dimensions=7), expected, atol=1e-6)
        raw = ask(normalize=False)
        assert abs(np.linalg.norm(raw) - 1) > 0.1
        np.testing.assert_allclose(raw / np.linalg.norm(raw), vectors["dog"], atol=1e-6)

    def test_what_is_too_long_can_be_cut(self, server: Running) -> None:
        body = {"input": ["a", "b" * 100], "truncate_prompt_tokens": -1}
        status, answer = server.call("/v1/embeddings", body)
        assert (status, answer["usage"]["prompt_tokens"]) == (200, 3 + LONGEST)

    @pytest.mark.parametrize(
        ("body", "param", "code"),
        [
            ({"input": ["a", "b" * 99]}, "input[1]", "context_length_exceeded"),
            ({"input": ["a", ""]}, "input[1]", "invalid_prompt"),
            ({"input": [[1, 2], [3, 99]]}, "input[1]", "invalid_prompt"),
            ({"input": [100_257, 3]}, "input[0]", "invalid_prompt"),
            ({"input": []}, "input", "invalid_value"),
            ({"input": {}}, "input", "invalid_value"),
            ({"input": ["a", [1]]}, "input", "invalid_value"),
            ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "invalid_value"),
            ({}, "input", "invalid_value"),
            ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
            ({"input": "a", "dimensions": 49}, "dimensions", "invalid_value"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
            ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
            ({"input": "a", "input_type": "query"}, "input_type", "invalid_value"),
        ],
    )
    def test_what_is_wrong_is_named(self, server: Running, body: dict[str, Any], param: str, code: str) -> None:
        status, answer = server.call("/v1/embeddings", body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)

    def test_another_model(self, server: Running) -> None:
        status, answer = server.call("/v1/embeddings", {"model": "text-embedding-3-small", "input": "a"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


class TestRanking:
    @pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
    def test_rerank(self, server: Running, vectors: dict[str, np.ndarray], path: str) -> None:
        documents = [TEXTS[1], {"text": TEXTS[2]}, TEXTS[4]]
        status, answer = server.call(path, {"query": "a cat", "documents": documents, "top_n": 2})
        assert status == 200 and answer["id"].startswith("rerank-") and answer["model"] == MODEL
        scores = {i: float(vectors["a cat"] @ vectors[TEXTS[place]]) for i, place in enumerate((1, 2, 4))}
        order = sorted(scores, key=lambda i: -scores[i])[:2]
        assert [each["index"] for each in answer["results"]] == order
        for each in answer["results"]:
            assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-5)
            assert each["document"]["text"] == [TEXTS[1], TEXTS[2], TEXTS[4]][each["index"]]

    def test_without_documents_in_the_answer(self, server: Running) -> None:
        body = {"query": "a", "documents": ["b"], "return_documents": False}
        (result,) = server.call("/v1/rerank", body)[1]["results"]
        assert result.keys() == {"index", "relevance_score"}

    @pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
    @pytest.mark.parametrize("one", [True, False])
    def test_score(self, server: Running, vectors: dict[str, np.ndarray], names: tuple[str, str], one: bool) -> None:
        first = "a cat" if one else ["a cat", "dog"]
        status, answer = server.call("/v1/score", {names[0]: first, names[1]: ["dog", "cat a"]})
        pairs = [("a cat", "dog"), ("a cat" if one else "dog", "cat a")]
        assert (status, answer["object"]) == (200, "list")
        for place, (pair, each) in enumerate(zip(pairs, answer["data"], strict=True)):
            assert (each["index"], each["object"]) == (place, "score")
            assert each["score"] == pytest.approx(float(vectors[pair[0]] @ vectors[pair[1]]), abs=1e-5)

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": ["b", "c" * 99]}, "documents[1]"),
            ("/v1/rerank", {"query": "c" * 99, "documents": ["b"]}, "query"),
            ("/v1/rerank", {"query": "", "documents": ["b"]}, "query"),
            ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents.text"),
            ("/v1/rerank", {"query": "a", "documents": ["b"] * (MAX_INPUTS + 1)}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
            ("/v1/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields"),
            ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, None),
            ("/v1/score", {"text_1": "a", "queries": "a", "text_2": "b"}, None),
            ("/v1/score", {"text_1": "a"}, "text_2"),
            ("/v1/score", {"text_1": "a", "text_2": ["b", "c" * 99]}, "text_2[1]"),
        ],
    )
    def test_what_is_wrong_is_named(self, server: Running, path: str, body: dict[str, Any], param: str | None) -> None:
        status, answer = server.call(path, body)
        assert (status, answer["error"]["param"]) == (400, param)

    def test_a_cross_encoder(self, tmp_path: Path) -> None:
        directory = write_cross_encoder(tmp_path / "cross")
        expected = {each.index: each.relevance_score for each in LLM(directory).rank("cats", TEXTS)}
        with running(lambda: LLM(directory)) as server:
            answer = server.call("/v1/rerank", {"query": "cats", "documents": TEXTS})[1]
            assert {x["index"]: x["relevance_score"] for x in answer["results"]} == pytest.approx(expected, abs=1e-5)
            scores = server.call("/v1/score", {"text_1": "cats", "text_2": TEXTS})[1]["data"]
            assert [each["score"] for each in scores] == pytest.approx([expected[i] for i in range(5)], abs=1e-5)
            status, refused = server.call("/v1/embeddings", {"input": "a"})
            assert status == 400 and "/v1/rerank" in refused["error"]["message"]


class TestOtherEndpoints:
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/prefixes", None),
            ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
        ],
    )
    def test_what_generates_says_what_the_model_is(self, server: Running, path: str, body: Any) -> None:
        status, answer = server.call(path, body)
        assert status == 400 and "it makes embeddings" in answer["error"]["message"]

    def test_what_has_a_meaning_answers(self, server: Running) -> None:
        assert server.call("/v1/models")[1]["data"][0]["max_model_len"] == LONGEST
        ids = server.call("/tokenize", {"prompt": "cat", "return_token_strs": True})[1]
        assert ids["token_strs"] == ["[CLS]", "c", "a", "t", "[SEP]"]
        assert server.call("/detokenize", {"tokens": ids["tokens"]})[0] == 200
        assert server.call("/detokenize", {"tokens": [99]})[0] == 400
        assert server.call("/tokenizer_info")[0] == server.call("/health")[0] == 200
        before = _metric(server, "prompt_tokens_total")
        server.call("/v1/embeddings", {"input": ["abc", "d"]})
        assert _metric(server, "prompt_tokens_total") == before + 8
        assert _metric(server, "num_inputs_waiting") == 0

    def test_a_generating_model_says_why_it_does_not_embed(self, tiny: Path) -> None:
        with running(lambda: LLM(tiny)) as server:
            for path, body in (
                ("/v1/embeddings", {"input": "a"}),
                ("/v1/rerank", {"query": "a", "documents": ["b"]}),
                ("/v1/score", {"text_1": "a", "text_2": "b"}),
            ):
                status, answer = server.call(path, body)
                assert status == 400 and "--task embed" in answer["error"]["message"]
        with running(lambda: LLM(tiny, task="embed")) as server:
            assert len(server.call("/v1/embeddings", {"input": "a"})[1]["data"][0]["embedding"]) == 32


def _metric(server: Running, name: str) -> float:
    text = server.raw("/metrics")[1].decode()
    (line,) = (line for line in text.splitlines() if line.startswith(f"gossamer:{name}{{"))
    return float(line.split()[-1])


class TestManyAtATime:
    def test_everybody_gets_the_own_vectors(self, server: Running, vectors: dict[str, np.ndarray]) -> None:
        def ask(number: int) -> None:
            texts = [TEXTS[(number + i) % len(TEXTS)] for i in range(1 + 40 * (number % 3))]
            status, answer = server.call("/v1/embeddings", {"input": texts})
            assert status == 200
            for text, each in zip(texts, answer["data"], strict=True):
                np.testing.assert_allclose(each["embedding"], vectors[text], atol=1e-5)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(24)))
        assert server.server.service.ready.pooling.waiting == 0

    @pytest.fixture
    def held(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[int]]]:
        """An event without which nothing is computed, and the sizes of the rounds so far."""
        go, rounds = threading.Event(), []
        compute = server.llm.pooling.compute

        def wait(inputs: list[Any]) -> Any:
            rounds.append(len(inputs))
            assert go.wait(60)
            return compute(inputs)

        monkeypatch.setattr(server.llm.pooling, "compute", wait)
        yield go, rounds
        go.set()

    def test_a_short_request_does_not_wait_for_a_long_one(
        self, server: Running, held: tuple[threading.Event, list[int]]
    ) -> None:
        go, rounds = held
        ended: list[str] = []

        def ask(name: str, count: int) -> None:
            assert server.call("/v1/embeddings", {"input": ["a"] * count})[0] == 200
            ended.append(name)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            long = pool.submit(ask, "long", 1200)
            wait_for(lambda: len(rounds) == 1)
            short = pool.submit(ask, "short", 1)
            wait_for(lambda: server.server.service.ready.pooling.waiting == 1201)
            go.set()
            for each in (long, short):
                each.result(60)
        assert ended == ["short", "long"] and max(rounds) <= 256 and sum(rounds) == 1201

    def test_a_round_has_a_bounded_number_of_tokens(
        self, server: Running, held: tuple[threading.Event, list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go, rounds = held
        monkeypatch.setattr("gossamer.server.pooling.ROUND_TOKENS", 100)
        go.set()
        assert server.call("/v1/embeddings", {"input": ["a" * 28] * 7})[0] == 200  # 30 tokens each
        assert rounds == [3, 3, 1]

    def test_the_queue_is_bounded(self, server: Running, held: tuple[threading.Event, list[int]]) -> None:
        go, rounds = held
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.call, "/v1/embeddings", {"input": ["a"] * 2000})
            wait_for(lambda: len(rounds) == 1)
            status, raw, headers = server.raw("/v1/embeddings", json.dumps({"input": "b"}).encode())
            assert (status, headers["retry-after"]) == (429, "1") and b"2000 inputs are waiting" in raw
            go.set()
            assert first.result(60)[0] == 200
        assert server.call("/v1/embeddings", {"input": "b"})[0] == 200

    def test_a_client_that_goes_frees_its_places(
        self, server: Running, held: tuple[threading.Event, list[int]]
    ) -> None:
        go, rounds = held
        answering = server.server.service.ready.pooling
        from gossamer.protocol import POOLING_BODIES

        body = POOLING_BODIES["/v1/embeddings"].parse({"input": ["a"] * 700})
        asked = asyncio.run_coroutine_threadsafe(answering.complete(body), server.loop)
        wait_for(lambda: len(rounds) == 1)
        asked.cancel()
        wait_for(lambda: answering.waiting == 256)  # what is being computed ends
        go.set()
        wait_for(lambda: answering.waiting == 0)
        assert rounds == [256]

    def test_a_failure_is_the_requests(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(inputs: list[Any]) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(server.llm.pooling, "compute", fail)
            status, answer = server.call("/v1/embeddings", {"input": "a"})
            assert (status, answer["error"]["code"]) == (500, "engine_error")
        assert server.call("/v1/embeddings", {"input": "a"})[0] == 200
        assert server.server.service.ready.pooling.waiting == 0


def lines(*bodies: tuple[str, dict[str, Any]]) -> str:
    return "".join(
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}) + "\n"
        for i, (url, body) in enumerate(bodies)
    )


MIXED = lines(
    ("/v1/embeddings", {"input": TEXTS}),
    ("/v1/embeddings", {"input": ["a", "b" * 99]}),
    ("/v1/rerank", {"query": "a cat", "documents": TEXTS}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/score", {"text_1": "a cat", "text_2": "dog"}),
    ("/v1/embeddings", {"input": "dog", "encoding_format": "base64"}),
)


class TestBatches:
    def check(self, records: list[dict[str, Any]], vectors: dict[str, np.ndarray]) -> None:
        by_id = {record["custom_id"]: record["response"] for record in records}
        assert [by_id[str(i)]["status_code"] for i in range(6)] == [200, 400, 200, 400, 200, 200]
        found = [each["embedding"] for each in by_id["0"]["body"]["data"]]
        np.testing.assert_allclose(found, [vectors[text] for text in TEXTS], atol=1e-5)
        assert by_id["1"]["body"]["error"]["param"] == "input[1]"
        assert by_id["2"]["body"]["results"][0]["index"] == 0
        assert "it makes embeddings" in by_id["3"]["body"]["error"]["message"]

    @pytest.mark.parametrize("sequences", ["256", "1"])
    def test_a_file(self, bert: Path, tmp_path: Path, vectors: dict[str, np.ndarray], sequences: str) -> None:
        (tmp_path / "in.jsonl").write_text(MIXED)
        arguments = ["batch", str(bert), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
        result = CliRunner().invoke(app, [*arguments, "--json", "--max-num-seqs", sequences])
        assert result.exit_code == 1, result.output  # two lines have failed
        summary = json.loads(result.stdout)
        assert (summary["completed"], summary["failed"], summary["engine"]) == (4, 2, None)
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        self.check(records, vectors)
        again = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--resume"]).stdout)
        assert (again["skipped"], again["completed"], again["failed"]) == (4, 0, 2)

    def test_lines_that_cannot_be_computed_fail_and_the_others_go_on(
        self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in.jsonl").write_text(lines(*(("/v1/embeddings", {"input": text}) for text in TEXTS)))
        llm = LLM(bert)
        compute = llm.pooling.compute

        def sometimes(inputs: list[Any]) -> Any:
            if len(inputs[0].ids) > 20:
                raise MemoryError
            return compute(inputs)

        monkeypatch.setattr(llm.pooling, "compute", sometimes)
        summary = BatchRunner(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_in_flight=1).run(llm)
        assert (summary.completed, summary.failed) == (3, 2)
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [each["response"]["status_code"] for each in records] == [200, 500, 200, 500, 200]

    def test_a_generating_model_refuses_the_lines_of_embeddings(
        self, make_tiny_llama: Callable[..., Path], tmp_path: Path
    ) -> None:
        directory = make_tiny_llama(tmp_path / "llama")
        (tmp_path / "in.jsonl").write_text(
            lines(("/v1/embeddings", {"input": "a"}), ("/v1/completions", {"prompt": "a", "max_tokens": 2}))
        )
        arguments = ["batch", str(directory), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--json"]
        summary = json.loads(CliRunner().invoke(app, arguments).stdout)
        assert (summary["completed"], summary["failed"]) == (1, 1)
        assert "--task embed" in summary["first_failures"][0]

    def test_on_the_server(self, client: openai.OpenAI, vectors: dict[str, np.ndarray]) -> None:
        content = lines(*(("/v1/embeddings", {"input": text}) for text in TEXTS)).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        output = client.batches.retrieve(batch.id).output_file_id
        assert output is not None
        records = [json.loads(line) for line in client.files.content(output).text.splitlines()]
        assert len(records) == len(TEXTS)
        for record in records:
            found = record["response"]["body"]["data"][0]["embedding"]
            np.testing.assert_allclose(found, vectors[TEXTS[int(record["custom_id"])]], atol=1e-5)
