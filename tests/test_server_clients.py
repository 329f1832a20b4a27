"""Old and simple clients: HTTP/1.0, half-closed connections, base URLs with more or less in them, prompts too long."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import openai
import pytest

from gossamer.server import http_protocol
from running_server import MODEL, Running, make_chat_llm, running, wait_for

BODY = {"prompt": "x", "max_tokens": 3, "temperature": 0}
LONG = BODY | {"max_tokens": 150, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.4, max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(lambda: make_chat_llm(tiny)) as server:
        yield server


@pytest.fixture
def slowed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of some milliseconds, so that a request is still running when it is to be."""
    forward = server.llm.engine.runner.forward
    monkeypatch.setattr(server.llm.engine.runner, "forward", lambda plan: (time.sleep(0.01), forward(plan))[1])


def ask(server: Running, head: str, body: dict[str, Any] | None = None, *, half_close: bool = False) -> socket.socket:
    raw = b"" if body is None else json.dumps(body).encode()
    fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(server.address, timeout=60)
    connection.sendall(f"{head}\r\n{fields}".encode() + raw)
    if half_close:
        connection.shutdown(socket.SHUT_WR)
    return connection


def everything(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    connection.close()
    return received


# --- HTTP/1.0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half_close", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_of_http_1_0_gets_no_chunks(server: Running, path: str, stream: bool, half_close: bool) -> None:
    body = BODY | {"stream": stream}
    if "chat" in path:
        body = {name: value for name, value in body.items() if name != "prompt"}
        body["messages"] = [{"role": "user", "content": "x"}]
    head, _, content = everything(ask(server, f"POST {path} HTTP/1.0", body, half_close=half_close)).partition(
        b"\r\n\r\n"
    )
    assert b" 200 " in head and b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    modern = everything(ask(server, f"POST {path} HTTP/1.1", body, half_close=True))
    assert (b"transfer-encoding: chunked" in modern.lower()) == stream
    if not stream:
        assert json.loads(content)["usage"]["completion_tokens"] == 3
        return
    *events, done, rest = content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_routes_and_errors_for_http_1_0(server: Running, method: str) -> None:
    for path, status in (("/health", 200), ("/v1/nothing", 404), ("/metrics", 200), ("/", 200)):
        if method == "HEAD" and path != "/health":
            continue
        head, _, content = everything(ask(server, f"{method} {path} HTTP/1.0")).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status and b"chunked" not in head
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None and (method == "HEAD" or len(content) == int(length[1]))


# --- connections that are closed by half ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_answer(server: Running, stream: bool) -> None:
    received = everything(ask(server, "POST /v1/completions HTTP/1.1", BODY | {"stream": stream}, half_close=True))
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    whole = server.call("/v1/completions", BODY)[1]["choices"][0]["text"]
    texts = re.findall(r'"text":("(?:[^"\\]|\\.)*")', received.decode())
    assert "".join(json.loads(text) for text in texts) == whole


@pytest.mark.usefixtures("slowed")
def test_a_half_closed_client_that_waits_long_gets_interim_responses_at_most(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "PROBE_SECONDS", 0.05)
    connection = ask(server, "POST /v1/completions HTTP/1.1", LONG, half_close=True)
    with HTTPResponse(connection) as response:
        response.begin()  # skips responses 100, as clients have to
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 150
    old = everything(ask(server, "POST /v1/completions HTTP/1.0", LONG, half_close=True))
    assert old.startswith(b"HTTP/1.1 200 OK\r\n")  # which knew none


@pytest.mark.usefixtures("slowed")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_closed_both_halves_takes_its_request_along(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(http_protocol, "PROBE_SECONDS", 0.05)
    before = server.llm.engine.stats.generated_tokens
    ask(server, "POST /v1/completions HTTP/1.1", LONG | {"stream": stream, "max_tokens": 450}).close()
    wait_for(lambda: server.llm.engine.stats.generated_tokens > before)
    server.wait_idle()
    assert server.llm.engine.stats.generated_tokens - before < 400


def test_half_of_a_request_is_no_request(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
    for half in (b"", b"GET /hea", head, head + b"{"):
        connection = socket.create_connection(server.address, timeout=60)
        connection.sendall(half)
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
    server.wait_idle()


def test_requests_in_a_row_before_the_half_close_are_all_answered(server: Running) -> None:
    connection = socket.create_connection(server.address, timeout=60)
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    assert everything(connection).count(b"HTTP/1.1 200 OK") == 2


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "", "/", "//v1//"])
def test_base_urls_with_and_without_what_is_in_them(server: Running, base: str) -> None:
    with openai.OpenAI(base_url=server.url + base, api_key="none", max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).usage.completion_tokens == 2
        assert client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2
        ).choices
        assert [each.id for each in client.models.list()] == [client.models.retrieve(MODEL).id] == [MODEL]
        file = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
        assert client.files.content(file.id).read() == b"{}\n" and client.files.delete(file.id).deleted
    for path in ("models", "models/", f"models/{MODEL}/", "files/", "batches/", "prefixes/"):
        status, _, headers = server.raw(f"{base.rstrip('/')}/{path}")
        assert status == 200 and "location" not in headers
    assert server.call(f"{base.rstrip('/')}/completions/", BODY)[0] == 200


def test_other_paths_with_a_slash_at_their_end_and_paths_that_are_none(server: Running) -> None:
    for path in ("/health/", "/version/", "/metrics/", "//health"):
        assert server.raw(path)[0] == 200
    assert server.call("/tokenize/", {"prompt": "x"})[1]["count"] == 1
    for path in ("/v1", "/v1/v1/models", "/v2/models", "/chat", "/v1/tokenize"):
        assert server.raw(path)[0] == 404


def test_keys_and_limits_know_every_form_of_a_path(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny), api_keys=("secret",), max_body=1000, max_file=100_000) as server:
        for path in ("/models", "/v1/models/", "//v1//models", "/v1/files/", "//files"):
            assert server.call(path)[0] == 401
        for path in ("/health/", "//version"):
            assert server.call(path)[0] == 200
        form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: '
        form += b'form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 50_000 + b"\r\n--x--\r\n"
        for path in ("/files", "/v1/files/", "/v1/files"):
            status, raw, _ = server.raw(
                path, form, content_type="multipart/form-data; boundary=x", authorization="Bearer secret"
            )
            assert status == 200, raw
            body = {"prompt": "x" * 2000}
            assert server.call(path.replace("files", "completions"), body, authorization="Bearer secret")[0] == 413


def test_a_model_that_is_a_path(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny)) as server:
        object.__setattr__(server.server.service.options, "model_names", ("./models/tiny/",))
        for path in ("/v1/models/./models/tiny/", "/v1/models/./models/tiny", "/models/./models/tiny/"):
            assert server.call(path)[1]["id"] == "./models/tiny/"


# --- lists and messages -----------------------------------------------------------------------------------------------


def test_files_come_in_the_order_that_is_asked_for(tiny: Path) -> None:
    with running(lambda: make_chat_llm(tiny)) as server:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            made = [client.files.create(file=(f"{i}.jsonl", b"{}\n"), purpose="batch").id for i in range(6)]
            assert [each.id for each in client.files.list()] == made[::-1]  # within one second
            assert [each.id for each in client.files.list(order="desc")] == made[::-1]
            assert [each.id for each in client.files.list(order="asc")] == made
            assert [each.id for each in client.files.list(order="asc", limit=2)] == made  # page by page
            assert [each.id for each in client.files.list(order="asc", after=made[2]).data] == made[3:]
        status, answer = server.call("/v1/files?order=random")
        assert status == 400 and answer["error"]["param"] == "order"


@pytest.mark.parametrize("prompt", ["x" * 600, "x" * 100_000, [5] * 600])
def test_clients_recognize_a_prompt_that_is_too_long(server: Running, prompt: Any) -> None:
    for stream in (False, True):
        status, answer = server.call("/v1/completions", {"prompt": prompt, "stream": stream})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "This model's maximum context length is 512 tokens. However, " in answer["error"]["message"]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        status, answer = server.call("/v1/chat/completions", {"messages": messages})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (
            400,
            "context_length_exceeded",
            "messages",
        )
        assert "maximum context length is 512 tokens" in answer["error"]["message"]
