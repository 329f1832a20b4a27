"""What takes long in one request is not done in the engine's thread, nor in the event loop; others go on meanwhile."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from connections import connect, post
from gossamer import LLM, SamplingParams
from gossamer.batch import input_file
from gossamer.engine.grammar import GrammarCompiler, compiler
from gossamer.engine.intake import Intake
from gossamer.engine.sampling import top_logprobs
from gossamer.errors import RequestError
from gossamer.protocol import BODIES, ChatCompletionRequest, CompletionRequest, decoding, encoding
from gossamer.protocol.decoding import InvalidJsonError, decode_json, measure
from gossamer.protocol.encoding import encode_json
from gossamer.server import answering, http, routes_info
from running_server import Running, make_chat_llm, running, wait_for

TINY_CONTEXT = 16_384
SLOW = Path(__file__).parent / "slow_grammars.py"
MEGABYTES_7 = 7_000_000


def slow_llm(directory: Path) -> LLM:
    """Its grammars are followed by the stand-in."""
    llm = make_chat_llm(directory, max_num_batched_tokens=256)
    factory = llm.engine.factory
    intake = factory.intake
    factory.grammars = GrammarCompiler(intake.tokenizer, intake.vocab_size, factory.eos_token_ids, file=SLOW)
    return llm


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "COMPILE_SECONDS", 0.5)
        patch.setattr(compiler, "MASK_SECONDS", 0.5)
        with running(lambda: slow_llm(tiny)) as server:
            yield server


# --- beside a streaming client ----------------------------------------------------------------------------------------


def filled(before: bytes, part: bytes, after: bytes) -> bytes:
    """JSON of some 7 MB: the same part again and again."""
    return before + b",".join([part] * (MEGABYTES_7 // (len(part) + 1))) + after


def members(count: int) -> bytes:
    return b",".join(b'"%d":1' % number for number in range(count))


LARGE: dict[str, tuple[str, bytes]] = {
    "ids": ("/v1/completions", filled(b'{"prompt":[', b"5", b"]}")),
    "lists of ids": ("/v1/completions", filled(b'{"prompt":[', b"[5]", b"]}")),
    "prompts": ("/v1/completions", filled(b'{"prompt":[', b'"a"', b"]}")),
    "messages": ("/v1/chat/completions", filled(b'{"messages":[', b'{"role":"user","content":"a"}', b"]}")),
    "wrong messages": ("/v1/chat/completions", filled(b'{"messages":[', b"{}", b"]}")),
    "biases": ("/v1/completions", b'{"prompt":"a","logit_bias":{' + members(500_000) + b"}}"),
    "unknown fields": ("/v1/completions", b'{"prompt":"a",' + members(500_000) + b"}"),
    "stop strings": ("/v1/completions", filled(b'{"prompt":"a","stop":[', b'"b"', b"]}")),
    "wrong stop strings": ("/v1/completions", filled(b'{"prompt":"a","stop":[', b"1", b"]}")),
    "stop tokens": ("/v1/completions", filled(b'{"prompt":"a","stop_token_ids":[', b"5", b"]}")),
    "lists in lists": ("/v1/completions", filled(b'{"prompt":"a","x":[', b"[[{}]]", b"]}")),
    "as many tokens as are read": ("/detokenize", b'{"tokens":[' + b"5," * 262_000 + b"5]}"),
    "a text": ("/v1/completions", filled(b'{"prompt":"', b"some words", b'"}')),
    "tokens": ("/detokenize", filled(b'{"tokens":[', b"5", b"]}")),
}


@contextmanager
def stream(server: Running) -> Iterator[list[float]]:
    """A client that streams without end; when its parts came."""
    body = json.dumps({"prompt": "Go on", "max_tokens": 15_000, "ignore_eos": True, "stream": True}).encode()
    times: list[float] = []
    with connect(server, post("/v1/completions", body)) as connection:

        def read() -> None:
            while connection.recv(1 << 16):
                times.append(time.perf_counter())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        wait_for(lambda: len(times) > 20)
        yield times
        assert reader.is_alive()  # it had tokens to the end
        connection.shutdown(socket.SHUT_RDWR)
        reader.join(60)


def longest_gap(times: list[float], work: Callable[[], Any]) -> float:
    """The longest time without a token while ``work`` is done, and a little longer."""
    start = time.perf_counter()
    work()
    time.sleep(0.1)
    end = time.perf_counter()
    during = [start, *(each for each in times if start < each < end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(during))


def blank_batch(server: Running) -> None:
    line = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}'
    form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    form += b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"\n" * 20_000_000 + line
    _, raw, _ = server.raw("/v1/files", form + b"\r\n--x--\r\n", content_type="multipart/form-data; boundary=x")
    body = {"input_file_id": json.loads(raw)["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = server.call("/v1/batches", body)[1]["id"]
    wait_for(lambda: server.call(f"/v1/batches/{batch}")[1]["status"] == "completed", 60)
    assert server.call(f"/v1/batches/{batch}")[1]["request_counts"]["completed"] == 1


def tokens_of(server: Running, text: str) -> list[str]:
    status, answer = server.call("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200 and answer["count"] == len(answer["tokens"])
    tokens: list[str] = answer["token_strs"]
    return tokens


def test_a_stream_goes_on_beside_all_of_it(server: Running) -> None:
    def ask(**fields: Any) -> int:
        return server.call("/v1/completions", {"prompt": "a", "temperature": 0, "max_tokens": 20} | fields)[0]

    works: dict[str, Callable[[], Any]] = {
        "log-probabilities of all tokens": lambda: ask(logprobs=256) == 400,
        "log-probabilities of a prompt": lambda: ask(prompt="word " * 300, logprobs=20, echo=True) == 200,
        "a form that compiles for ever": lambda: ask(structured_outputs={"choice": ["slow to compile"]}) == 400,
        "a mask that takes for ever": lambda: ask(structured_outputs={"regex": "a~b"}) == 400,
        "blank lines": lambda: blank_batch(server) is None,
        "a text longer than the context": lambda: server.call("/tokenize", {"prompt": "word " * 60_000})[0] == 400,
        "a long text to be tokenized": lambda: len(tokens_of(server, "word " * 16_000)) == 80_000,
    }
    for name, (path, body) in LARGE.items():
        works[name] = lambda path=path, body=body: server.raw(path, body)[0] in (200, 400)
    with stream(server) as times:
        usual = longest_gap(times, lambda: time.sleep(1))
        for name, work in works.items():
            gaps: list[float] = []
            while len(gaps) < 3:  # the machine may have something else to do for a while
                gaps.append(longest_gap(times, lambda work=work: _holds(work)) - 5 * usual)
                if gaps[-1] < 0.5:
                    break
            assert min(gaps) < 0.5, (name, gaps)


def _holds(work: Callable[[], Any]) -> None:
    assert work()


# --- where it is done -------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The names of the threads that pieces of work were done in."""
    seen: dict[str, set[str]] = {}

    def watch(owner: Any, name: str, work: str, condition: Callable[..., bool] = lambda *arguments: True) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if condition(*arguments):
                seen.setdefault(work, set()).add(threading.current_thread().name.rpartition("_")[0])
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(http, "decode_json", "read", lambda raw, what: len(raw) > decoding.SHORT)
    watch(answering, "encode_json", "write", lambda answer: answer["choices"][0].get("logprobs") is not None)
    watch(routes_info, "encode_json", "tokens written", lambda answer: len(answer["tokens"]) > answering.LONG_TEXT)
    watch(Intake, "encode", "long", lambda intake, prompt, *rest: len(prompt) > answering.LONG_TEXT)
    watch(Intake, "encode", "short", lambda intake, prompt, *rest: isinstance(prompt, str) and len(prompt) < 100)
    watch(input_file, "_skip_blank", "blank")
    return seen


def test_long_work_has_threads_of_its_own(server: Running, threads: dict[str, set[str]]) -> None:
    assert server.call("/v1/completions", {"prompt": "word " * 15_000, "user": "x"})[0] == 400
    assert server.call("/v1/completions", {"prompt": "word", "logprobs": 3, "max_tokens": 3})[0] == 200
    blank_batch(server)
    tokens_of(server, "word " * 16_000)
    assert threads["tokens written"] == {"long-texts"}
    assert threads["read"] == {"bodies"} and threads["write"] == {"bodies"}
    assert threads["long"] == {"long-texts"} and threads["short"] == {"tokenizer"}
    assert threads["blank"] and all(name.startswith("asyncio") for name in threads["blank"])


def test_a_request_that_is_prepared_has_its_place_in_the_queue(tiny: Path) -> None:
    with running(lambda: slow_llm(tiny), max_queue=1) as server:
        loop = server.server.service.ready.engine_loop
        body = {"prompt": "a", "n": 200, "structured_outputs": {"choice": ["slow to compile"]}}
        asking = threading.Thread(target=server.call, args=("/v1/completions", body))
        asking.start()
        wait_for(lambda: loop.num_sequences == 200)
        assert server.call("/v1/completions", {"prompt": "a", "n": 100})[0] == 429
        assert server.call("/v1/completions", {"prompt": "a", "n": 2, "max_tokens": 2})[0] == 200
        asking.join(60)
        wait_for(lambda: loop.num_sequences == 0)


def test_a_form_is_compiled_no_longer_when_its_client_has_left(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = server.llm.engine.factory.grammars
    monkeypatch.setitem(grammars._host._setup, "compile_seconds", 600.0)
    body = json.dumps({"prompt": "a", "structured_outputs": {"choice": ["slow to compile", "or not"]}}).encode()
    with connect(server, post("/v1/completions", body)):
        wait_for(lambda: "or not" in "".join(grammars._grammars))
    wait_for(lambda: "or not" not in "".join(grammars._grammars) and not grammars._compiling)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_bounded(server: Running) -> None:
    limit = server.server.service.options.max_logprobs
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/v1/completions", {"prompt": "a", "logprobs": limit}),
        ("/v1/completions", {"prompt": "a b", "prompt_logprobs": limit}),
        ("/v1/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": limit}),
    ):
        assert server.call(path, body | {"max_tokens": 2})[0] == 200
        more = {name: value + 1 if value == limit and value is not True else value for name, value in body.items()}
        status, answer = server.call(path, more | {"max_tokens": 2})
        assert status == 400 and "--max-logprobs" in answer["error"]["message"]


@given(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40), st.data())
def test_ranks_count_the_tokens_that_are_more_probable(values: list[float], data: st.DataObject) -> None:
    logits = torch.tensor([[*values, 3.0]])
    target = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) + 1))
    (row,) = top_logprobs(logits, torch.tensor([target]), count)
    assert len(row) in (count, count + 1)
    for token, logprob in row.items():
        assert logprob.rank == 1 + int((logits[0] > logits[0, token]).sum())


def test_log_probabilities_of_a_whole_vocabulary(tiny: Path) -> None:
    llm = LLM(tiny)
    size = llm.engine.intake.vocab_size
    (output,) = llm.generate("x", SamplingParams(max_tokens=2, logprobs=size))
    assert [len(entry) for entry in output.outputs[0].logprobs or []] == [size, size]


@given(
    st.recursive(
        st.none() | st.integers() | st.text('ab"\\:,[]{}é', max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\,:[', max_size=3), inner, max_size=4),
        max_leaves=30,
    )
)
def test_the_shape_of_json(value: Any) -> None:
    shape = measure(json.dumps(value).encode())
    assert shape == measure(json.dumps(value, ensure_ascii=False, indent=1).encode())
    assert (shape.containers, shape.members, shape.separators, shape.depth) == _shape(value)
    assert json.loads(encode_json(value)) == value


@pytest.mark.parametrize("value", [list(range(50_000)), {"tokens": ["é"] * 50_000, "count": 1}, ["x"] * encoding.PIECE])
def test_long_lists_are_written_in_pieces(value: Any) -> None:
    pieces = list(encoding._pieces(value, encoding.DEPTH))
    assert json.loads("".join(pieces)) == value
    assert max(map(len, pieces)) < 10 * encoding.PIECE


def _shape(value: Any) -> tuple[int, int, int, int]:
    if not isinstance(value, dict | list):
        return 0, 0, 0, 0
    inner = np.array([_shape(each) for each in (value.values() if isinstance(value, dict) else value)] or [[0] * 4])
    containers, members, separators, _ = inner.sum(0).tolist()
    own = len(value) if isinstance(value, dict) else 0
    return 1 + containers, own + members, max(len(value) - 1, 0) + separators, 1 + int(inner[:, 3].max())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" + b"[]," * 40_000 + b"1]", "40001 objects and lists"),
        (b"{" + members(40_000) + b"}", "40000 members of objects"),
        (b"[" + b"1," * 300_000 + b"1]", "300000 values"),
        (b"[" * 30_000 + b"]" * 30_000, "nested too deeply"),
        (b"[" * 70_000, "nested too deeply"),
    ],
)
def test_json_with_too_much_in_it(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidJsonError, match=message):
        decode_json(raw, "it")


def test_a_text_may_hold_as_many_marks_as_it_likes() -> None:
    text = '[{"a": "b\\\\"},' * 50_000
    assert decode_json(json.dumps({"prompt": text}).encode(), "it") == {"prompt": text}


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (CompletionRequest, {"prompt": "a", "stop": ["x"] * 129}, "stop"),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [1] * 4097}, "stop_token_ids"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        (CompletionRequest, {"prompt": ["a"] * 4097}, "prompt"),
        (CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": ["x"] * 16_385}}, "structured_outputs"),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": 1}] * 30_000}, "messages.0.content"),
    ],
)
def test_fields_are_bounded(kind: Any, body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as refusal:
        kind.parse(body)
    assert (refusal.value.param or "").startswith(field)
    assert kind in BODIES.values()


@pytest.mark.parametrize("blank", [b"\n", b"  \n", b"\r\n", b"\t\n\n", b" " * 9000 + b"\n"])
def test_blank_lines_are_counted_and_passed_over(tmp_path: Path, blank: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + blank * 5000 + b"  x\n" + blank + b"y\n\n" + blank * 3 + b"   z" + blank * 2)
    numbers = [line.number for line in input_file.read_lines(path)]
    expected = [
        place for place, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip(b"\xef\xbb\xbf \t\r")
    ]
    assert numbers == expected and input_file.count_lines(path) == 3
