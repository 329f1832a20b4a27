"""A server that speaks just enough of OpenAI's API, well and badly, for tests of what asks it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.bench.serve_load import Load, LoadResult, Prompts, run_load

TOKENS = 5
OK, ODD, STATUS, DROP, ERROR_EVENT, NO_DONE, GARBAGE, CLOSING, SILENT, HANGING_UP = range(10)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def events(count: int = TOKENS) -> list[bytes]:
    """Those of an answer: some texts are not ASCII, the one before the last is empty, then the usage."""
    texts = [f"é{number}" for number in range(count)] + [""]
    usage = {"prompt_tokens": 10, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 8}}
    heads = [event({"choices": [{"text": text}], "usage": None}) for text in texts]
    return [*heads, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


class FakeServer:
    """Speaks just enough HTTP. ``plan`` says how each completion, in the order of arrival, goes; then all go well."""

    def __init__(self, plan: list[int]) -> None:
        self.plan = list(plan)
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.at_once = self.most_at_once = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        fields = dict(line.split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
        body = await reader.readexactly(int(fields[b"content-length"]))
        if head.startswith(b"GET"):
            text = json.dumps({"data": [{"id": "fake"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
            return True
        self.bodies.append(json.loads(body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._complete(self.plan.pop(0) if self.plan else OK, writer)
        finally:
            self.at_once -= 1

    async def _complete(self, way: int, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        if way == STATUS:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")
        elif way == GARBAGE:
            writer.write(b"SMTP ready\r\n")
        elif way == SILENT:
            await asyncio.sleep(5)
        elif not self.bodies[-1].get("stream"):
            text = json.dumps({"choices": [{"text": "all"}], "usage": {"completion_tokens": 9}}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        elif way == CLOSING:  # as HTTP/1.0 did: the connection's end is the answer's
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"".join(events()))
            return False
        else:
            await self._stream(way, writer)
        await writer.drain()
        return way not in (DROP, GARBAGE, SILENT, HANGING_UP)

    async def _stream(self, way: int, writer: asyncio.StreamWriter) -> None:
        parts = events()
        if way == DROP:
            writer.write(HEAD + chunk(parts[0]) + chunk(parts[1])[:-9])
            return
        if way == NO_DONE:
            parts = parts[:-1]
        if way == ERROR_EVENT:
            parts = [parts[0], event({"error": {"message": "out of memory"}}), parts[-1]]
        wire = HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
        step = 7 if way == ODD else len(wire)  # in the middle of heads, sizes, lines and characters
        for start in range(0, len(wire), step):
            writer.write(wire[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.001)


@contextmanager
def fake_server(*plan: int) -> Iterator[FakeServer]:
    """In a thread, since the clients have an event loop of their own."""
    fake, loop, started = FakeServer(list(plan)), asyncio.new_event_loop(), threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()

    def work() -> None:
        loop.run_until_complete(run())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


class Characters:
    """A tokenizer of one token per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def small(**changes: Any) -> Load:
    settings: dict[str, Any] = {"clients": 2, "requests": 6, "prefix": 20, "suffix": 5, "new": TOKENS, "timeout": 10.0}
    return Load(**(settings | changes))


def run(fake: FakeServer, load: Load, **options: Any) -> LoadResult:
    return run_load(fake.url, load, Prompts(Characters(), load), model="fake", **options)
