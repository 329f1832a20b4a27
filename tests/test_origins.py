"""Who may use the server through somebody's browser, and what else a client sends beside its request."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from connections import GET_HEALTH, chunked, closed, connect, status_of
from gossamer.server.origins import is_local, server_hosts
from running_server import Running, make_chat_llm, running, wait_for

TINY_CONTEXT = 512
FORM = (
    b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--x\r\ncontent-disposition: form-data; name="file"; filename="caf\xc3\xa9.jsonl"\r\n\r\n{}\n\r\n--x--\r\n'
)
MULTIPART = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parent") / "new" / "data"


@pytest.fixture(scope="module")
def server(tiny: Path, data_dir: Path) -> Iterator[Running]:
    with running(
        lambda: make_chat_llm(tiny),
        data_dir=data_dir,
        allowed_hosts=("ai.example.org",),
        allowed_origins=("https://friend.example",),
        idle_timeout=1.5,
    ) as server:
        yield server


def upload(server: Running, **headers: str) -> tuple[int, dict[str, object]]:
    status, raw, _ = server.raw("/v1/files", FORM, content_type=MULTIPART, **headers)
    return status, json.loads(raw)


def test_names_that_are_not_the_servers(server: Running) -> None:
    port = server.address[1]
    for name in (
        "localhost",
        f"localhost:{port}",
        f"127.0.0.1:{port}",
        f"[::1]:{port}",
        "LOCALHOST.",
        "ai.example.org",
    ):
        assert server.call("/health", host=name)[0] == 200, name
    for name in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "",
    ):
        for path in ("/health", "/", "/v1/completions"):
            status, answer = server.call(path, host=name)
            assert status == 403 and answer["error"]["code"] == "host_not_allowed", name


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", (), {"localhost", "127.0.0.1", "::1"}),
        ("127.0.0.2", (), {"localhost", "127.0.0.1", "::1", "127.0.0.2"}),
        ("::1", ("[2001:db8::1]:80",), {"localhost", "127.0.0.1", "::1", "2001:db8::1"}),
        ("0.0.0.0", ("Name.example:8000",), {"localhost", "127.0.0.1", "::1", "0.0.0.0", "name.example"}),
        ("0.0.0.0", (), None),
        ("192.0.2.1", (), None),
        ("localhost", ("*",), None),
    ],
)
def test_names_of_a_server(host: str, allowed: tuple[str, ...], expected: set[str] | None) -> None:
    assert server_hosts(host, allowed) == expected
    assert is_local(host) == (host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))


def test_uploads_of_foreign_pages(server: Running) -> None:
    own = f"http://{server.address[0]}:{server.address[1]}"
    assert upload(server)[0] == 200  # no browser
    assert upload(server, origin=own)[0] == 200
    assert upload(server, origin=own, sec_fetch_site="same-origin")[0] == 200
    assert upload(server, origin="https://friend.example", sec_fetch_site="cross-site")[0] == 200
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://evil.example", "sec_fetch_site": "cross-site"},
        {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site"},
    ):
        before = server.call("/v1/files")[1]["data"]
        status, answer = upload(server, **headers)
        assert status == 403 and answer["error"]["code"] == "origin_not_allowed", headers
        assert server.call("/v1/files")[1]["data"] == before
        # Nor do other requests that change something; what only reads is the browser's to guard.
        assert server.call("/v1/batches/batch-0/cancel", method="POST", **headers)[0] == 403
        assert server.call("/v1/prefixes/x", method="DELETE", **headers)[0] == 403
        assert server.call("/health", **headers)[0] == 200


def test_a_charset_reaches_no_codec(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import codecs

    asked = []
    lookup = codecs.lookup
    monkeypatch.setattr(codecs, "lookup", lambda name: (asked.append(name), lookup(name))[1])
    for charset in ("utf-16", "rot13", "idna", "undefined", "no-such-codec", '"x\\"y"'):
        status, raw, _ = server.raw("/v1/files", FORM, content_type=f"{MULTIPART}; charset={charset}")
        assert status == 200 and json.loads(raw)["filename"] == "café.jsonl", raw
    assert set(asked) <= {"utf-8", "utf8"}


def test_uploads_with_a_boundary_of_any_spelling(server: Running) -> None:
    for spelled, boundary in (('"a b"', b"a b"), ("a'()+_,-./:=?", b"a'()+_,-./:=?"), ("X", b"X")):
        form = FORM.replace(b"--x", b"--" + boundary)
        status, raw, _ = server.raw("/v1/files", form, content_type=f"Multipart/Form-Data; boundary={spelled}")
        assert status == 200 and json.loads(raw)["bytes"] == 3, raw


def test_files_are_private(server: Running, data_dir: Path) -> None:
    status, stored = upload(server)
    assert status == 200
    body = {"input_file_id": stored["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = server.call("/v1/batches", body)[1]["id"]
    wait_for(lambda: server.call(f"/v1/batches/{batch}")[1]["status"] == "completed", 60)
    paths = [data_dir.parent, data_dir, *data_dir.rglob("*")]
    assert len(paths) > 6
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


# --- beside the request -----------------------------------------------------------------------------------------------

CHUNKED = chunked("/detokenize")


def push(connection: socket.socket, part: bytes, count: int) -> bool:
    """Send a part again and again; whether the server has closed the connection over it."""
    try:
        for _ in range(count):
            connection.sendall(part)
    except ConnectionError:
        return True
    return closed(connection)


def test_trailers_are_dropped(server: Running) -> None:
    with connect(server) as connection:
        for trailer in (b"", b"x-late: 1\r\nhost: evil.example\r\n"):
            connection.sendall(CHUNKED + b'd\r\n{"tokens":[5]\r\n1\r\n}\r\n0\r\n' + trailer + b"\r\n")
            assert status_of(connection) == 200


@pytest.mark.parametrize(
    ("before", "part"),
    [
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"x-late: " + b"a" * 1000 + b"\r\n"),
        (CHUNKED + b"1\r\n{\r\n0\r\nx-late: ", b"a" * 1000),
        (CHUNKED + b"1;extension=", b"a" * 1000),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n", b"x-many: a\r\n"),
    ],
    ids=["trailers", "a trailer", "an extension", "headers"],
)
def test_what_is_no_body_is_bounded(server: Running, before: bytes, part: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(before)
        assert push(connection, part, 100_000 // len(part) * 4)
    assert server.call("/health")[0] == 200


def test_many_requests_behind_one(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(GET_HEALTH * 5)
        answers = b""
        while answers.count(b"200 OK") < 5:
            part = connection.recv(65536)
            assert part, answers
            answers += part
    with connect(server) as connection:
        assert push(connection, GET_HEALTH * 1000, 20)
    assert server.call("/health")[0] == 200


def test_a_body_that_goes_on_behind_its_answer(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(chunked("/nothing") + b"1\r\n{\r\n")
        assert status_of(connection) == 404
        assert closed(connection)  # after the idle timeout
    with connect(server) as connection:
        connection.sendall(chunked("/nothing"))
        assert push(connection, b"10000\r\n" + b"x" * 65536 + b"\r\n", 3000)
