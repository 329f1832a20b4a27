"""The server as a process: starting, stopping under load, being killed, and going on with its batches."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from forked import Program, run_program
from running_server import MODEL, TEMPLATE, Running, make_chat_llm, running, wait_for

MAIN = "from gossamer.cli.app import main; main()"
LONG = {"prompt": "Tell me everything", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.4, max_position_embeddings=512)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Process:
    """``gossamer serve`` as a user starts it, or, where its start is not what is looked at, with its imports done."""

    def __init__(self, model: Path, *options: str, imports: bool = False) -> None:
        settings = ["--port", "0", "--threads", "1", "--served-model-name", MODEL, "--log-format", "json", *options]
        command = ["serve", str(model), *settings]
        self.process: subprocess.Popen[str] | Program
        if imports:
            everything = [sys.executable, "-c", MAIN, *command]
            self.process = subprocess.Popen(everything, stderr=subprocess.PIPE, text=True)
        else:
            self.process = Program(MAIN, *command)
        self.lines: list[str] = []
        self.url = ""
        while not self.url:
            assert self.process.stderr is not None
            line = self.process.stderr.readline()
            assert line, "".join(self.lines)
            self.lines.append(line)
            if found := re.search(r"listening on (http://\S+?)\"", line):
                self.url = found[1]
        # a pipe that nobody reads fills, and then the server waits for somebody to read it
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        wait_for(lambda: self.call("/health")[0] == 200, 60)

    def call(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Exit status, and the records of the log."""
        self._reader.join(60)
        return self.process.wait(30), [json.loads(line) for line in self.lines if line.startswith("{")]


@pytest.fixture
def start(tiny: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*options: str, imports: bool = False) -> Process:
        started.append(Process(tiny, *options, imports=imports))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()


def test_a_life(start: Callable[..., Process]) -> None:
    process = start("--drain-timeout", "30", imports=True)
    status, answer = process.call("/health")
    assert status == 503 and "loading" in answer["error"]["message"]
    assert process.call("/v1/completions", LONG)[0] == 503
    process.wait_ready()
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(process.call, "/v1/completions", LONG) for _ in range(6)]
        wait_for(lambda: process.call("/v1/prefixes")[1]["running"] == 6)
        process.process.send_signal(signal.SIGTERM)
        assert all(future.result()[0] == 200 for future in answers)  # nothing that runs is lost
    status, records = process.end()
    assert status == 0
    served = [record for record in records if record.get("path") == "/v1/completions" and record["status"] == 200]
    assert len(served) == 6 and all(re.fullmatch("[0-9a-f]{32}", record["request_id"]) for record in served)
    assert records[-1]["message"] == "ended"


def test_what_does_not_end_in_time_is_told(start: Callable[..., Process]) -> None:
    process = start("--drain-timeout", "0.2")
    process.wait_ready()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(process.call, "/v1/completions", LONG | {"n": 64}) for _ in range(8)]
        wait_for(lambda: process.call("/v1/prefixes")[1]["running"] > 60)
        process.process.send_signal(signal.SIGTERM)
        for future in answers:
            status, answer = future.result()
            assert status == 503 and "shutting down" in answer["error"]["message"]
    assert process.end()[0] == 0


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    process = Process(tmp_path)
    status, records = process.end()
    assert status == 1 and any("ending" in record["message"] for record in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "port"),
        (["--pin", "/nowhere/at/all"], "cannot pin /nowhere/at/all"),
        (["--log-format", "xml"], "--log-format"),
        (["--max-body", "much"], "memory must be"),
        (["--api-key", ""], "API key"),
    ],
)
def test_options_that_make_no_sense(tiny: Path, options: list[str], message: str) -> None:
    done = run_program(MAIN, "serve", tiny, *options)
    assert done.returncode == 2 and message in done.stderr


def test_a_port_that_is_taken(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_program(MAIN, "serve", tiny, "--port", port)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1, port {port}" in done.stderr


def test_a_directory_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = Process(tiny, "--data-dir", str(tmp_path / "file"))
    status, records = process.end()
    assert status == 1 and any("cannot keep files" in record["message"] for record in records)


def test_the_end_may_come_while_the_model_is_loaded(start: Callable[..., Process]) -> None:
    process = start(imports=True)
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0


def test_pinned_files(tiny: Path, tmp_path: Path) -> None:
    text, chat = tmp_path / "text.txt", tmp_path / "chat.json"
    text.write_text("A text that many prompts begin with. " * 3)
    chat.write_text(json.dumps([{"role": "system", "content": "Be kind. " * 9}]))
    with running(lambda: make_chat_llm(tiny), pinned=(text, chat)) as server:
        _, picture = server.call("/v1/prefixes")
        assert [prefix["name"] for prefix in picture["data"]] == ["text.txt", "chat.json"]
        messages = [*json.loads(chat.read_text()), {"role": "user", "content": "Hello"}]
        body = {"messages": messages, "max_tokens": 2}
        usage = server.call("/v1/chat/completions", body)[1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= picture["data"][1]["tokens"]


def test_pinned_prefixes_survive_the_servers_death(start: Callable[..., Process], tmp_path: Path) -> None:
    pinned, disk = tmp_path / "rules.txt", tmp_path / "disk"
    pinned.write_text("A text that many prompts begin with. " * 8)
    body = {"prompt": pinned.read_text() + "And so it goes on.", "max_tokens": 8, "temperature": 0}
    size = len(pinned.read_text())
    process = start("--prefix-dir", str(disk), "--pin", str(pinned))
    process.wait_ready()
    expected = process.call("/v1/completions", body)[1]
    wait_for(lambda: process.call("/v1/prefixes")[1]["disk"]["written_files"] == 1)
    process.process.kill()
    assert [file.suffix for file in disk.iterdir()] == [".safetensors"]
    process = start("--prefix-dir", str(disk))
    process.wait_ready()
    found = process.call("/v1/completions", body)[1]
    assert found["choices"] == expected["choices"]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == size
    with urllib.request.urlopen(process.url + "/metrics", timeout=60) as response:
        assert f'gossamer:prefix_disk_hits_total{{model_name="{MODEL}"}} {size}.0' in response.read().decode()
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0


# --- batches ----------------------------------------------------------------------------------------------------------


def lines(count: int, **fields: Any) -> bytes:
    body = {"model": MODEL, "max_tokens": 5, "temperature": 0} | fields
    requests = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body | {"prompt": f"Number {i}"}}
        for i in range(count)
    ]
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def run_batch(client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

    def ended() -> bool:
        return client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled")

    wait_for(ended, 60)
    return client.batches.retrieve(batch.id)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(lambda: make_chat_llm(tiny, max_num_seqs=4), max_queue=6) as server:
        yield server


def test_a_batch_with_openais_client(client: openai.OpenAI) -> None:
    bad = b'{"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "top_p": 7}}\n'
    other = b'{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}\n'
    batch = run_batch(client, lines(30) + bad + b"no JSON\n" + other)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (33, 30, 3)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"r{i}" for i in range(30)}
    for answer in answers:
        expected = client.completions.create(
            model=MODEL, prompt=f"Number {answer['custom_id'][1:]}", max_tokens=5, temperature=0
        )
        assert answer["response"]["body"]["choices"][0]["text"] == expected.choices[0].text
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert [error["custom_id"] for error in errors if error["response"]] == ["bad", "c"] or len(errors) == 3
    assert batch.id in {each.id for each in client.batches.list()}
    assert client.files.delete(batch.error_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.error_file_id)


def test_batches_and_clients_share_the_server(server: Running, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(run_batch, client, lines(60, max_tokens=20))
        for _ in range(10):
            assert server.call("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] in (200, 429)
        assert batch.result().request_counts.completed == 60


def test_a_batch_may_be_cancelled(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(200, max_tokens=200, ignore_eos=True)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    wait_for(lambda: client.batches.retrieve(batch.id).status == "cancelled")
    ended = client.batches.retrieve(batch.id)
    kept = client.files.content(ended.output_file_id).text.splitlines()
    assert len(kept) == ended.request_counts.completed < 200
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "file-../x", "file-" + "0" * 32, "file-" + "A" * 32, "%2e%2e"])
def test_files_that_are_none(server: Running, name: str) -> None:
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert server.call(path)[0] == 404
    body = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"}
    status, answer = server.call("/v1/batches", body)
    assert status == 404 and answer["error"]["param"] == "file_id"
    assert server.call(f"/v1/batches/{name}")[0] == 404


def test_uploads_that_are_none(server: Running) -> None:
    assert server.call("/v1/files", {"file": "x"})[0] == 400
    form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    for data, param in ((form, "file"), (form.replace(b"purpose", b"other"), "other"), (b"broken", None)):
        status, raw, _ = server.raw("/v1/files", data, content_type="multipart/form-data; boundary=x")
        assert status == 400, raw
        assert param is None or json.loads(raw)["error"]["param"] == param


def test_a_batch_survives_the_servers_death(start: Callable[..., Process], tmp_path: Path) -> None:
    first = start("--data-dir", str(tmp_path), "--max-num-seqs", "4")
    first.wait_ready()
    client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="none")
    file = client.files.create(file=("in.jsonl", lines(120, max_tokens=60, ignore_eos=True)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    answers = tmp_path / "batches" / f"{batch.id}.answers.jsonl"
    wait_for(lambda: answers.exists() and answers.read_bytes().count(b"\n") >= 5, 60)
    first.process.kill()
    first.process.wait()
    kept = [json.loads(line)["id"] for line in answers.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    second = start("--data-dir", str(tmp_path))
    second.wait_ready()
    client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="none")
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    ended = client.batches.retrieve(batch.id)
    records = [json.loads(line) for line in client.files.content(ended.output_file_id).text.splitlines()]
    assert sorted(record["custom_id"] for record in records) == sorted(f"r{i}" for i in range(120))
    assert {record["id"] for record in records} >= set(kept)  # what was finished was not done again
    assert ended.request_counts.completed == 120
