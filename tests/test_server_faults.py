"""Clients that break off, creep, flood or lie, and an engine that fails: everybody else is served."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from connections import chunked, closed, connect, post, status_of
from running_server import Running, make_chat_llm, running, wait_for

TINY_CONTEXT = 512
LONG = {"prompt": "Tell me everything", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "Be brief", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(lambda: make_chat_llm(tiny), idle_timeout=1.5) as server:
        yield server


def assert_serves(server: Running) -> None:
    start = time.monotonic()
    status, answer = server.call("/v1/completions", SHORT)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3, answer
    assert time.monotonic() - start < 10


# --- clients that go, creep or stay silent ----------------------------------------------------------------------------


@pytest.mark.usefixtures("slowed")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_along(server: Running, stream: bool) -> None:
    connection = connect(server, post("/v1/completions", json.dumps(LONG | {"stream": stream, "n": 3}).encode()))
    wait_for(lambda: len(server.llm.engine.scheduler.active) == 3)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    assert_serves(server)
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
    )  # reset, as when a process is killed
    connection.close()
    server.wait_idle()
    assert_serves(server)


def test_a_thousand_half_open_connections(server: Running) -> None:
    beginnings = [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 100]
    connections = [connect(server, beginnings[i % 3]) for i in range(1000)]
    try:
        assert_serves(server)
        assert server.call("/health")[0] == 200
        for connection in connections:  # the server does not keep them for ever
            connection.settimeout(15)
        assert all(closed(connection) for connection in connections)
    finally:
        for connection in connections:
            connection.close()
    assert_serves(server)


def test_a_slow_reader_holds_nobody_up(server: Running) -> None:
    body = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 5}).encode()
    slow = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        connection.sendall(post("/v1/completions", body))
        slow.append(connection)
    for _ in range(5):
        assert_serves(server)
    server.wait_idle(60)  # the engine does not wait for readers
    received = b""
    slow[0].settimeout(20)
    while b"[DONE]" not in received:  # and nothing is lost for one who reads in the end
        part = slow[0].recv(65536)
        assert part, received[-300:]
        received += part
    for connection in slow:
        connection.close()
    events = [line[6:] for line in received.decode(errors="replace").splitlines() if line.startswith("data: {")]
    texts = [""] * 8
    for event in events:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] += choice["text"]
    expected = server.call("/v1/completions", LONG)[1]["choices"][0]["text"]
    assert texts == [expected] * 8


def test_a_body_that_does_not_come(server: Running) -> None:
    connection = connect(server, post("/v1/completions", b'{"prompt": ', length=100))
    connection.settimeout(15)
    answer = b""
    while part := connection.recv(65536):  # until the server closes
        answer += part
    assert b" 408 " in answer and b'"code":"timeout"' in answer
    connection.close()
    assert_serves(server)


def test_a_head_that_does_not_end(server: Running) -> None:
    connection = connect(server, b"GET /health HTTP/1.1\r\n")
    connection.settimeout(15)
    try:
        for i in range(200):
            connection.sendall(f"x-{i}: {'a' * 1000}\r\n".encode())
        assert closed(connection)
    except ConnectionError:
        pass  # closed while we were sending
    assert_serves(server)


def test_a_second_head_that_does_not_end(server: Running) -> None:
    body = json.dumps(SHORT | {"user": "x" * 100_000}).encode()  # longer than a head may be
    connection = connect(server, post("/v1/completions", body))
    connection.settimeout(15)
    try:
        assert status_of(connection) == 200
        connection.sendall(b"GET /health HTTP")  # in two pieces, on the same connection
        time.sleep(0.2)
        connection.sendall(b"/1.1\r\nhost: localhost\r\n\r\n")
        assert status_of(connection) == 200
        connection.sendall(post("/v1/completions", json.dumps(LONG).encode()))
        for i in range(200):
            connection.sendall(f"x-{i}: {'a' * 10000}\r\n".encode())
        assert closed(connection)
    except ConnectionError:
        pass  # closed while we were sending
    assert_serves(server)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"NONSENSE\r\n\r\n", b"\0" * 300])
def test_what_is_not_http(server: Running, data: bytes) -> None:
    connection = connect(server, data)
    connection.settimeout(15)
    assert closed(connection)
    assert_serves(server)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8: byte 12 is 0xff"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "valid dictionary"),
        (b'"x"', "valid dictionary"),
        (b"null", "valid dictionary"),
        (b'{"prompt": "x", "prompt_": 1}', "prompt_ is not supported"),
        (b'{"prompt": "x", "seed": 99999999999999999999999999999999}', ""),
        (b'{"prompt": [1e400]}', "prompt"),
        (b'{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    ],
    ids=lambda value: repr(value)[:50],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/prefixes"])
def test_bodies_that_are_none(server: Running, path: str, body: bytes, message: str) -> None:
    status, raw, _ = server.raw(path, body)
    answer = json.loads(raw)
    if path == "/v1/completions" and not message:
        assert status == 200  # unusual, and right
        return
    assert status == 400, answer
    if path == "/v1/completions" or "JSON" in message or "UTF" in message or "nested" in message:
        assert message in answer["error"]["message"]
    assert server.call("/health")[0] == 200


def test_a_body_must_say_that_it_is_json(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, raw, _ = server.raw("/v1/completions", b'{"prompt": "x"}', content_type=kind)
        assert status == 415 and json.loads(raw)["error"]["code"] == "unsupported_media_type"


def test_prompts_of_ten_megabytes(server: Running) -> None:
    status, answer = server.call("/v1/completions", {"prompt": "x" * 10_000_000})
    assert status == 413 and answer["error"]["code"] == "body_too_large"
    start = time.monotonic()
    status, answer = server.call("/v1/completions", {"prompt": "word " * 1_500_000})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    status, answer = server.call("/v1/completions", {"prompt": [5] * 250_000})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    status, answer = server.call("/v1/completions", {"prompt": [5] * 1_000_000})
    assert status == 400 and "999999 values" in answer["error"]["message"]
    assert time.monotonic() - start < 10
    assert_serves(server)


def test_a_chunked_body_is_bounded_too(server: Running) -> None:
    connection = connect(server, chunked("/tokenize"))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    connection.settimeout(15)
    answer = b""
    try:
        for _ in range(200):
            connection.sendall(chunk)
    except ConnectionError:
        pass
    with contextlib.suppress(ConnectionError):
        answer = connection.recv(4096)
    assert not answer or b" 413 " in answer
    assert_serves(server)


@pytest.mark.parametrize("path", ["/../etc/passwd", "/v1/files/../../x", "/%2e%2e/%2e%2e/etc/passwd", "/v1/nothing"])
def test_paths_that_lead_nowhere(server: Running, path: str) -> None:
    assert server.call(path)[0] == 404


def test_methods_that_are_not_taken(server: Running) -> None:
    status, answer = server.call("/v1/completions", method="GET")
    assert status == 405 and "GET" in answer["error"]["message"]


# --- more than there is room for --------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny, max_num_seqs=2), max_queue=3) as server:
        forward = server.llm.engine.runner.forward
        gate = threading.Event()

        def gated(plan: Any) -> Any:
            gate.wait(30)
            return forward(plan)

        server.llm.engine.runner.forward = gated
        with ThreadPoolExecutor(5) as pool:
            running_ones = [pool.submit(server.call, "/v1/completions", SHORT) for _ in range(5)]
            wait_for(lambda: server.server.service.ready.engine_loop.num_sequences == 5)
            for stream in (False, True):
                status, raw, headers = server.raw("/v1/completions", json.dumps(SHORT | {"stream": stream}).encode())
                assert status == 429 and json.loads(raw)["error"]["code"] == "server_busy"
                assert 1 <= int(headers["retry-after"]) <= 60
            gate.set()
            assert all(future.result()[0] == 200 for future in running_ones)
        assert server.call("/v1/completions", SHORT)[0] == 200


def test_a_request_beyond_the_memory_fails_alone(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny, memory=160 * 256)) as server:
        for stream in (False, True):
            status, raw, _ = server.raw("/v1/completions", json.dumps(LONG | {"stream": stream}).encode())
            if status == 200:  # it was streamed until its memory ended
                assert b'"code":"memory_budget_exceeded"' in raw and raw.endswith(b"data: [DONE]\n\n")
            else:
                assert status == 400 and json.loads(raw)["error"]["code"] == "memory_budget_exceeded"
        status, answer = server.call("/v1/completions", SHORT | {"prompt": "x" * 300})
        assert status == 400 and answer["error"]["code"] == "memory_budget_exceeded"
        assert_serves(server)


def test_an_answer_that_takes_too_long_is_given_up(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny), request_timeout=0.6) as server:
        forward = server.llm.engine.runner.forward
        server.llm.engine.runner.forward = lambda plan: (time.sleep(0.05), forward(plan))[1]
        status, raw, headers = server.raw("/v1/completions", json.dumps(LONG).encode())
        assert status == 504 and json.loads(raw)["error"]["code"] == "timeout"
        assert headers["x-should-retry"] == "false"
        status, raw, _ = server.raw("/v1/completions", json.dumps(LONG | {"stream": True}).encode())
        assert status == 200 and b'"code":"timeout"' in raw and raw.endswith(b"data: [DONE]\n\n")
        server.wait_idle()


# --- an engine that fails ---------------------------------------------------------------------------------------------


def test_a_step_that_raises_costs_one_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.llm.engine
    forward = engine.runner.forward

    def failing(plan: Any) -> Any:
        time.sleep(0.005)
        if any(s.tokens[:3] == poison for s in engine.scheduler.active):
            raise ZeroDivisionError("a bad day")
        return forward(plan)

    poison = server.llm.tokenizer.encode("!!!")
    monkeypatch.setattr(engine.runner, "forward", failing)
    good = LONG | {"max_tokens": 60}
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.call, "/v1/completions", good) for _ in range(6)]
        bad = pool.submit(server.call, "/v1/completions", good | {"prompt": "!!! poison"})
        status, answer = bad.result()
        assert status == 500 and answer["error"]["code"] == "engine_error" and "a bad day" in answer["error"]["message"]
        texts = {future.result()[1]["choices"][0]["text"] for future in others}
    assert len(texts) == 1
    assert server.call("/health")[0] == 200


def test_an_engine_that_is_broken_is_said_to_be(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny)) as server:

        def broken() -> Any:
            raise RuntimeError("nothing works")

        server.llm.engine.step = server.llm.engine.step_apart = broken
        status, answer = server.call("/v1/completions", SHORT)
        assert status == 500 and "nothing works" in answer["error"]["message"]
        wait_for(lambda: server.server.service.state == "failed")
        wait_for(lambda: server.server.should_exit)
    assert server.server.failed


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny), api_keys=("first", "sécond")) as server:
        for header in (None, "Bearer wrong", "Bearer ", "Basic first", "first", "Bearer first2", "Bearer\tfirst"):
            given = {} if header is None else {"authorization": header}
            for path in ("/v1/models", "/metrics", "/v1/prefixes", "/v1/batches"):
                status, answer = server.call(path, **given)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key", (header, path)
            assert server.call("/v1/completions", SHORT, **given)[0] == 401
        for key in ("first", "sécond".encode().decode("latin-1")):
            assert server.call("/v1/completions", SHORT, authorization=f"Bearer {key}")[0] == 200
        assert server.call("/health")[0] == 200 and server.raw("/")[0] == 200
