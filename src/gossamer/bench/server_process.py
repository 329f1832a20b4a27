"""A server as a process of its own, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import httptools

from gossamer.bench.http_client import Address, Connection, Response
from gossamer.errors import PeerError

_LISTENING = re.compile(r"listening on (http://\S+:\d+)")
_LINES = 6
_ANSWER_SECONDS = 5.0  # for a question that a server can answer at once


def free_port() -> int:
    """A port that nobody listens on now, for servers that cannot look for one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, path: str) -> Response | None:
    """What a server answers at a path, or ``None`` if it does not."""

    async def ask() -> Response:
        connection = Connection(Address.parse(url), _ANSWER_SECONDS)
        try:
            return await connection.request("GET", path)
        finally:
            connection.close()

    try:
        return asyncio.run(ask())
    except (OSError, httptools.HttpParserError):
        return None


class ServerProcess:
    """Starts a server.

    Args:
        name: for messages.
        command: with its arguments.
        environment: of the process.
        url: where it will listen; ``None`` to read that in its log, as ``listening on http://...``.

    Raises:
        PeerError: it cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], url: str | None = None) -> None:
        self.name = name
        self.command = list(command)
        self._url = url
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a group of its own, to end all of it
            )
        except OSError as error:
            raise PeerError(f"cannot be started: {error}", peer=name) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens; after :meth:`wait_ready`."""
        assert self._url is not None
        return self._url

    def wait_ready(self, path: str, timeout: float) -> None:
        """Until it answers at ``path`` with status 200.

        Raises:
            PeerError: it has ended, or takes longer than ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            self.check()
            if self._url is None and (found := _LISTENING.search(self._log_text())):
                self._url = found.group(1)
            if self._url is not None and (response := get(self._url, path)) is not None and response.status == 200:
                return
            if time.monotonic() > end:
                raise PeerError(f"was not ready within {timeout:g} s", peer=self.name, stderr=self._last_lines())
            time.sleep(0.1)

    def check(self) -> None:
        """Whether it runs.

        Raises:
            PeerError: it has ended.
        """
        if (code := self._process.poll()) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise PeerError(how, peer=self.name, stderr=self._last_lines())

    def cpu_seconds(self) -> float | None:
        """Processor time of all its processes so far; ``None`` where Linux does not tell."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = file.read_text().rpartition(")")[2].split()  # a name in parentheses may have spaces
                if int(fields[2]) == self.pid:  # its group
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None

    def stop(self, timeout: float = 30.0) -> bool:
        """SIGTERM, and SIGKILL for what is left. Returns whether it ended by itself within ``timeout`` seconds."""
        self._process.terminate()
        try:
            self._process.wait(timeout)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        return ended

    def _log_text(self) -> str:
        # another file offset than the server's own, which would go on writing where we have read
        return os.pread(self._log.fileno(), 2**20, max(0, os.fstat(self._log.fileno()).st_size - 2**20)).decode(
            errors="replace"
        )

    def _last_lines(self) -> list[str]:
        return [line.rstrip() for line in self._log_text().splitlines() if line.strip()][-_LINES:]
