"""Several models at one address: what is loaded, what ends for it, and what passes through."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from starlette.requests import Request
from typer.testing import CliRunner

from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, EngineError
from gossamer.server import ModelSpec, ServerOptions, model_pool
from gossamer.server import front as front_module
from gossamer.server.errors import HttpError
from gossamer.server.model_pool import ModelPool

GB = 10**9


class FakeProcess:
    """A process that is ready at once, unless its model cannot be loaded, or has to wait for ``gate``."""

    started: list[str]
    ended: list[str]
    broken: set[str]
    gate: asyncio.Event | None

    def __init__(self, name: str, load: object, options: ServerOptions) -> None:
        self.name, self.pid = name, 0
        self.died = asyncio.Event()
        self.started.append(name)

    async def ready(self) -> None:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.name in self.broken:
            raise EngineError(f"the model {self.name!r} could not be loaded: it is broken")

    async def wait(self) -> None:
        await self.died.wait()

    def kill(self) -> None:
        self.broken.add(self.name)
        if self.gate is not None:
            self.gate.set()

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.ended.append(self.name)


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], ModelPool]:
    """Models a, b and c, which take 1, 2 and 3 GB."""
    FakeProcess.started, FakeProcess.ended, FakeProcess.broken, FakeProcess.gate = [], [], set(), None
    monkeypatch.setattr(model_pool, "ModelProcess", FakeProcess)
    monkeypatch.setattr(model_pool, "_PROCESS", 0)
    monkeypatch.setattr(model_pool, "resident_memory", lambda pid: None)
    specs = {name: ModelSpec(lambda: None, size * GB - 1, 1) for name, size in (("a", 1), ("b", 2), ("c", 3))}
    return lambda gigabytes: ModelPool(specs, ServerOptions(), int(gigabytes * GB))


async def ask(pool: ModelPool, *names: str) -> None:
    for name in names:
        async with pool.use(name) as process:
            assert process.name == name


def states(pool: ModelPool) -> list[Any]:
    return [pool.describe(name)["status"] for name in pool.names]


class TestPool:
    def test_what_fits_stays(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(6)
            await ask(pool, "a", "b", "c", "a", "b", "c")
            assert FakeProcess.started == ["a", "b", "c"] and not FakeProcess.ended
            await pool.stop()
            assert sorted(FakeProcess.ended) == ["a", "b", "c"]

        asyncio.run(scene())

    def test_the_least_recently_used_ends_for_another(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(4)
            await ask(pool, "a", "b", "a", "c")  # c needs the room of b alone
            assert FakeProcess.ended == ["b"]
            await ask(pool, "b")
            assert FakeProcess.ended == ["b", "a", "c"]
            values = [each["value"] for each in states(pool)]
            assert values == ["unloaded", "loaded", "unloaded"]

        asyncio.run(scene())

    def test_one_that_answers_is_waited_for(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(3)
            async with pool.use("a"):
                waiting = asyncio.create_task(ask(pool, "c"))
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not waiting.done() and FakeProcess.started == ["a"]
                await ask(pool, "a")  # what is loaded answers meanwhile
            await asyncio.wait_for(waiting, 10)
            assert FakeProcess.started == ["a", "c"] and FakeProcess.ended == ["a"]

        asyncio.run(scene())

    def test_a_model_is_loaded_once_for_all_who_ask_for_it(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(3)
            await asyncio.gather(*(ask(pool, "b") for _ in range(8)))
            assert FakeProcess.started == ["b"]

        asyncio.run(scene())

    def test_one_that_never_fits_is_refused(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(2)
            await ask(pool, "a")
            with pytest.raises(HttpError, match=r"'c' needs about 3\.0 GB with its cache, and --models-memory allows"):
                await ask(pool, "c")
            assert FakeProcess.started == ["a"] and not FakeProcess.ended

        asyncio.run(scene())

    def test_one_that_cannot_be_loaded_takes_no_room_and_says_why(
        self, make_pool: Callable[[float], ModelPool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scene() -> None:
            pool = make_pool(4)
            FakeProcess.broken = {"c"}
            for _ in range(2):
                with pytest.raises(HttpError, match="could not be loaded: it is broken") as caught:
                    await ask(pool, "c")
            assert caught.value.status == 503 and caught.value.headers["x-should-retry"] == "false"
            assert FakeProcess.started == ["c"]  # the second time it was not tried
            await ask(pool, "a", "b")
            FakeProcess.broken = set()
            monkeypatch.setattr(model_pool.time, "monotonic", lambda now=time.monotonic: now() + model_pool.REMEMBERED)
            await ask(pool, "c")

        asyncio.run(scene())

    def test_one_that_has_ended_by_itself_is_loaded_again(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(4)
            async with pool.use("a") as process:
                process.died.set()  # type: ignore[attr-defined]  # it is a FakeProcess
                while pool.describe("a")["memory_bytes"]:
                    await asyncio.sleep(0)
                await ask(pool, "a")
            assert FakeProcess.started == ["a", "a"]

        asyncio.run(scene())

    def test_one_that_ends_by_itself_makes_room(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(3)
            async with pool.use("a") as process:
                waiting = asyncio.create_task(ask(pool, "c"))
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not waiting.done()
                process.died.set()  # type: ignore[attr-defined]
                again = asyncio.create_task(ask(pool, "a"))  # as a request whose answer has broken off
                await asyncio.wait_for(waiting, 10)
                await asyncio.wait_for(again, 10)
            assert FakeProcess.started == ["a", "c", "a"]

        asyncio.run(scene())

    def test_loading_goes_on_when_whoever_asked_is_gone(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(3)
            FakeProcess.gate = asyncio.Event()
            first = asyncio.create_task(ask(pool, "a"))
            while not FakeProcess.started:
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            FakeProcess.gate.set()
            await ask(pool, "a")
            assert FakeProcess.started == ["a"] and not FakeProcess.ended

        asyncio.run(scene())

    def test_a_model_that_is_always_busy_keeps_no_other_out(
        self, make_pool: Callable[[float], ModelPool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_pool, "PATIENCE", 0.05)

        async def scene() -> None:
            pool = make_pool(3)
            done = False

            async def busy() -> None:
                while not done:
                    async with pool.use("a"):
                        await asyncio.sleep(0.02)

            crowd = [asyncio.create_task(busy()) for _ in range(3)]
            await asyncio.sleep(0.03)
            await asyncio.wait_for(ask(pool, "c"), 10)
            done = True
            await asyncio.wait_for(asyncio.gather(*crowd), 10)

        asyncio.run(scene())

    def test_the_end_lets_nobody_wait(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(3)
            async with pool.use("a"):
                waiting = asyncio.create_task(ask(pool, "c"))
                for _ in range(20):
                    await asyncio.sleep(0)
                await pool.stop()
                with pytest.raises(HttpError, match="shutting down"):
                    await asyncio.wait_for(waiting, 10)
            with pytest.raises(HttpError, match="shutting down"):
                await ask(pool, "a")

        asyncio.run(scene())

    def test_the_end_ends_what_is_loading_and_loads_nothing_more(self, make_pool: Callable[[float], ModelPool]) -> None:
        async def scene() -> None:
            pool = make_pool(6)
            FakeProcess.gate = asyncio.Event()
            waiting = [asyncio.create_task(ask(pool, name)) for name in ("a", "b", "c")]
            while not FakeProcess.started:
                await asyncio.sleep(0)
            assert pool.loading
            pool.drain()
            found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
            assert all("shutting down" in str(each) for each in found)
            assert FakeProcess.started == FakeProcess.ended == ["a"] and not pool.loading
            await pool.stop()

        asyncio.run(scene())


class Front:
    """A real server of two models, as a process."""

    def __init__(self, models: list[str], log: Path) -> None:
        code = "from gossamer.cli.app import main; main()"
        arguments = ["--port", "0", "--memory", "64MB", "--models-memory", "16GB", "--log-format", "text"]
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "serve", *models, *arguments], stderr=stderr, start_new_session=True
            )
        wait_until(lambda: "listening on" in log.read_text())
        self.url = next(line.split()[-1] for line in log.read_text().splitlines() if "listening on" in line)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def children(self) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> list[str]:
    """Two names of one tiny model."""
    other = tmp_path_factory.mktemp("other") / "model"
    other.symlink_to(tiny)
    return [str(tiny), str(other)]


@pytest.fixture(scope="module")
def front(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(models, tmp_path_factory.mktemp("log") / "stderr")
    yield front
    front.process.kill()
    front.process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(pid: int) -> bool:
    """Whether a process has ended, or only waits to be collected."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up as Linux has them")
class TestProcesses:
    def test_requests_reach_the_model_that_they_name(self, front: Front, models: list[str]) -> None:
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=120)
        texts = []
        for name in models:
            made = client.completions.create(model=name, prompt="one two", max_tokens=5, temperature=0)
            parts = client.completions.create(model=name, prompt="one two", max_tokens=5, temperature=0, stream=True)
            assert made.model == name and "".join(part.choices[0].text for part in parts) == made.choices[0].text
            texts.append(made.choices[0].text)
        assert texts[0] == texts[1]
        listed = front.get("/v1/models")["data"]
        assert [(each["id"], each["status"]["value"]) for each in listed] == [(name, "loaded") for name in models]
        assert all(each["memory_bytes"] > 64e6 for each in listed)
        assert front.get(f"/v1/prefixes?model={models[1]}")["object"] == "list"
        with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="temperature"):  # what the model's server says
            client.completions.create(model=models[0], prompt="a", temperature=-1)
        for path, status in (("/metrics", 400), ("/v1/files", 404), ("/nothing", 400)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                front.get(path)
            assert caught.value.code == status

    def test_paths_of_the_models_are_described(self, front: Front) -> None:
        paths = front.get("/openapi.json")["paths"]
        assert {"/v1/chat/completions", "/v1/embeddings", "/v1/messages"} <= set(paths) and "/v1/files" not in paths

    def test_a_client_that_goes_frees_its_model(self, front: Front, models: list[str]) -> None:
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(model=models[0], prompt="a", max_tokens=400, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        next(iter(stream))
        stream.close()
        wait_until(lambda: front.get(f"/v1/prefixes?model={models[0]}")["running"] == 0)
        wait_until(lambda: front.get(f"/v1/models/{models[0]}")["requests"] == 0)

    def test_a_model_that_is_killed_is_loaded_again(self, front: Front, models: list[str]) -> None:
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=120)
        client.completions.create(model=models[0], prompt="a", max_tokens=1)
        for pid in front.children():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(map(gone, front.children())))
        assert client.completions.create(model=models[0], prompt="a", max_tokens=1).choices

    def test_its_models_end_with_it_however_it_ends(self, front: Front, models: list[str]) -> None:
        client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=120)
        client.completions.create(model=models[0], prompt="a", max_tokens=1)
        children = [pid for pid in front.children() if not gone(pid)]
        assert children
        front.process.kill()
        wait_until(lambda: all(map(gone, children)))

    def test_ctrl_c_ends_it_while_models_are_loaded(self, models: list[str], tmp_path: Path) -> None:
        front = Front(models, tmp_path / "stderr")
        wait_until(lambda: bool(front.children()))
        body = json.dumps({"model": models[1], "prompt": "a", "max_tokens": 1}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(front.url + "/v1/completions", body, headers)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(urllib.request.urlopen, request, timeout=120)  # for the second model
            wait_until(lambda: front.get(f"/v1/models/{models[1]}")["requests"] == 1)
            children = front.children()
            os.killpg(front.process.pid, signal.SIGINT)  # as a terminal does
            with pytest.raises(urllib.error.HTTPError) as refused:
                waiting.result()
        assert refused.value.code == 503 and front.process.wait(60) == 0
        wait_until(lambda: all(map(gone, children)))
        log = front.log.read_text()
        assert log.count("loading ") == 1 and "Traceback" not in log


class _BrokenOff(httpx2.AsyncByteStream):
    """A stream of which one event came."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        raise httpx2.ReadError("the connection is gone")


@pytest.mark.parametrize("dead", [True, False])
def test_a_stream_that_breaks_off_ends_with_an_error(dead: bool) -> None:
    lost, sent = [], []

    async def ended() -> bool:
        return dead

    async def lose(process: object) -> None:
        lost.append(process)

    @asynccontextmanager
    async def use(name: str) -> AsyncIterator[Any]:
        yield SimpleNamespace(name=name, key="k", address="http://127.0.0.1:1", ended=ended)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def scene() -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8"}
        answer = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, stream=_BrokenOff()))
        service = SimpleNamespace(options=ServerOptions(), use=use, lost=lose)
        async with httpx2.AsyncClient(transport=answer) as client:
            state = SimpleNamespace(service=service, client=client)
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
            scope |= {"app": SimpleNamespace(state=state), "gossamer.request_id": "1"}
            await front_module._Forwarded(Request(scope), "a", b"{}")(scope, receive, send)

    asyncio.run(scene())
    assert sent[1]["body"] == b"data: {}\n\n" and len(lost) == dead
    event, end, rest = sent[-1]["body"].decode().split("\n\n")
    message = json.loads(event.removeprefix("data: "))["error"]["message"]
    assert ("has ended" if dead else "does not answer") in message and end == "data: [DONE]" and rest == ""
    assert not sent[-1]["more_body"]


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["a", "b", "--served-model-name", "c"], "are of a server of one model"),
            (["a", "b", "--data-dir", "d"], "are of a server of one model"),
            (["a", "a"], "given twice"),
            (["./no/such/model", "b"], "cannot find the model"),
        ],
    )
    def test_what_several_models_cannot_have(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert isinstance(result.exception, ConfigurationError | FileNotFoundError)
        assert message in str(result.exception)
