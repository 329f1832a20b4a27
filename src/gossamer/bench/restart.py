"""The time to the first token over a long prefix, after a restart: computed anew, and read from disk.

A first server pins the prefix, with ``--prefix-dir``, and is killed once it is written. Then servers are started in
turn, without that directory and with it, and each is asked once, as soon as it is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gossamer.bench.http_client import Address, Connection, Response
from gossamer.bench.machine import describe
from gossamer.bench.peers.process import child_environment
from gossamer.bench.serve_load import Load, Prompts, run_load
from gossamer.bench.server_process import ServerProcess, get
from gossamer.errors import ConfigurationError, PeerError
from gossamer.models.load import load_tokenizer
from gossamer.models.resolve import resolve_model

COMPUTED, READ = "computed", "read from disk"
_NAME = "gossamer"
_MAIN = "from gossamer.cli.app import main; main()"


def bench_restart(
    model: str,
    *,
    prefix: int = 4000,
    suffix: int = 32,
    quantization: str | None = "int8",
    repeats: int = 3,
    threads: int,
    timeout: float = 600.0,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure both. Returns ``{"machine": {...}, "model": ..., "prefix": ..., "file_bytes": ..., "results": [...]}``.

    Each result has ``start`` (:data:`COMPUTED` or :data:`READ`), the median ``ttft_ms`` and those of all ``rounds``,
    and ``cached_tokens`` of the prompt. ``speedup`` is the first median over the second.

    The file's pages are given back to the system before each round, so that it comes from the disk itself, where the
    system knows how to do so.

    Args:
        model: whatever :func:`gossamer.models.resolve.resolve_model` understands.
        prefix: tokens that are pinned.
        suffix: tokens of the question behind it; other ones in each round.
        quantization: of the servers; ``None`` takes the checkpoint as it is.
        repeats: rounds.
        threads: CPU threads of the servers.
        timeout: seconds that an answer, or the start of a server, may take.
        progress: called with what happens now.

    Raises:
        ConfigurationError: there are no rounds.
        PeerError: a server fails, or does not write the prefix.
    """
    if repeats < 1:
        raise ConfigurationError(f"repeats must be at least 1, got {repeats}")
    load = Load(clients=1, requests=1, prefix=prefix, suffix=suffix, new=8, token_ids=True, timeout=timeout)
    prompts = Prompts(load_tokenizer(resolve_model(model)), load)
    command = [sys.executable, "-c", _MAIN, "serve", model, "--port", "0", "--log-format", "text"]
    command += ["--quantization", quantization] if quantization else []
    ttft: dict[str, list[float]] = {COMPUTED: [], READ: []}
    cached: dict[str, int | None] = {}
    with TemporaryDirectory(prefix="gossamer-prefixes-") as directory:
        on_disk = [*command, "--prefix-dir", directory]
        progress("a first server computes the prefix and writes it")
        with _server(on_disk, threads, timeout) as server:
            _write(server, prompts[0][:prefix], timeout)
        for number in range(repeats):
            for start, arguments in ((COMPUTED, command), (READ, on_disk)):
                progress(f"round {number + 1} of {repeats}, {start}")
                with _server(arguments, threads, timeout) as server:
                    _forget_pages(Path(directory))
                    result = run_load(server.url, load, prompts, model=model, first=number)
                    if not result.ttft:
                        raise PeerError(f"answered nothing: {dict(result.errors)}", peer=_NAME)
                    ttft[start].append(result.ttft[0])
                    cached[start] = result.cached_tokens
        size = sum(file.stat().st_size for file in Path(directory).iterdir())
    medians = {start: statistics.median(times) for start, times in ttft.items()}
    return {
        "machine": describe() | {"threads": threads},
        "model": model,
        "weights": quantization or "as they are",
        "prefix": prefix,
        "suffix": suffix,
        "file_bytes": size,
        "results": [
            {
                "start": start,
                "ttft_ms": medians[start] * 1e3,
                "cached_tokens": cached[start],
                "rounds": [each * 1e3 for each in times],
            }
            for start, times in ttft.items()
        ],
        "speedup": medians[COMPUTED] / medians[READ],
    }


@contextmanager
def _server(command: list[str], threads: int, timeout: float) -> Iterator[ServerProcess]:
    """A server that is ready. It is killed in the end: nothing may depend on what it does when it is told to stop."""
    server = ServerProcess(_NAME, command, os.environ | child_environment(threads))
    try:
        server.wait_ready("/health", timeout)
        yield server
    finally:
        server.stop(0)


def _write(server: ServerProcess, tokens: list[int], timeout: float) -> None:
    """Pin a prefix, and wait until it is on disk."""
    _ask(server, "/v1/prefixes", {"prompt": tokens}, timeout)
    end = time.monotonic() + timeout
    while True:
        found = get(server.url, "/v1/prefixes")
        disk = json.loads(found.body)["disk"] if found is not None else {}
        if disk.get("written_files"):
            return
        if disk.get("write_failures") or time.monotonic() > end:
            raise PeerError("did not write the prefix", peer=_NAME)
        time.sleep(0.1)


def _ask(server: ServerProcess, path: str, body: dict[str, Any], timeout: float) -> None:
    async def ask() -> Response:
        connection = Connection(Address.parse(server.url), timeout)
        try:
            return await connection.request("POST", path, json.dumps(body).encode())
        finally:
            connection.close()

    response = asyncio.run(ask())
    if response.status != 200:
        raise PeerError(f"refused {path}: {response.body[:500].decode(errors='replace')}", peer=_NAME)


def _forget_pages(directory: Path) -> None:
    """Let the system drop what it has of the files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
