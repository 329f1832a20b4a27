"""A real server in a thread, on a real socket, with a tiny model: for tests that look into it while it runs."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossamer import LLM
from gossamer.server import ServerOptions, create_app
from gossamer.server.run import Server, make_server

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MODEL = "tiny"


class Running:
    """A running server and its model."""

    def __init__(self, server: Server, llm: LLM, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.llm, self.loop = server, llm, loop

    @property
    def url(self) -> str:
        return self.server.address

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def call(self, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> tuple[int, Any]:
        """Status and decoded body of one request."""
        status, raw, _ = self.raw(path, None if body is None else json.dumps(body).encode(), method=method, **headers)
        return status, json.loads(raw)

    def raw(
        self, path: str, data: bytes | None = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, bytes, Any]:
        names = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(self.url + path, data, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The decoded events of a stream; checks its framing."""
        status, raw, headers = self.raw(path, json.dumps(body | {"stream": True}).encode())
        assert status == 200, raw
        assert headers["content-type"].startswith("text/event-stream")
        *events, end, rest = raw.decode().split("\n\n")
        assert end == "data: [DONE]" and rest == ""
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until no sequence holds memory and none waits."""
        wait_for(lambda: not self.llm.engine.requests and not self.llm.engine.scheduler.active, seconds)
        assert not self.llm.engine.scheduler.waiting


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def make_chat_llm(directory: Path, **options: Any) -> LLM:
    """A tiny model, with a chat template, whose answers do not end early."""
    llm = LLM(directory, **options)
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@contextmanager
def running(make: Callable[[], LLM], **options: Any) -> Iterator[Running]:
    """A server that is ready; afterwards it has ended."""
    llms: list[LLM] = []
    ready = threading.Event()
    holder: dict[str, Any] = {}

    def load() -> LLM:
        llms.append(make())
        return llms[0]

    def run() -> None:
        settings = ServerOptions(port=0, model_names=(MODEL,), **options)
        server = holder["server"] = make_server(create_app(load, settings), settings)

        async def serve() -> None:
            holder["loop"] = asyncio.get_running_loop()
            ready.set()
            await server.serve()

        asyncio.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(20)
    server: Server = holder["server"]
    wait_for(lambda: bool(server.address) and server.service.state != "loading", 60)
    assert server.service.state == "ready", server.service.reason
    try:
        yield Running(server, llms[0], holder["loop"])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
