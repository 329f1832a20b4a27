"""A peer: another project's process, asked one thing at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, NoReturn

from gossamer.errors import PeerError

CHILD = Path(__file__).with_name("child.py")
_STDERR_LINES = 6
_STDERR_BYTES = 16384


class Peer:
    """A process that runs ``child.py`` with one of the scripts beside it, from its first request to :meth:`close`.

    Args:
        name: for messages.
        python: the interpreter of the peer's environment.
        script: defines the ``Decoder`` that answers.
        threads: what OpenMP is told; the script tells its library as well.
        timeout: seconds that an answer may take.
    """

    def __init__(self, name: str, python: str | Path, script: Path, *, threads: int, timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        self._command = [str(python), "-P", str(CHILD), str(script)]
        self._environment = child_environment(threads)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the peer

    @property
    def running(self) -> bool:
        """Whether there is a process; the first request starts one, a failure ends it."""
        return self._process is not None

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer. ``child.py`` lists the commands.

        Raises:
            PeerError: the process reports an error, cannot start, ends, answers nonsense or not in time. It is gone
                afterwards, and the next request starts another one.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except OSError:
            line = ""  # it has closed its stdin
        except queue.Empty:
            self._fail(f"gave no answer to {command!r} within {self.timeout:g} s")
        except BaseException:  # Ctrl-C: its answer would be taken for that to the next request
            self.close()
            raise
        if not line:
            code = process.wait()
            killed = f"killed by signal {-code}; was there enough memory?" if code < 0 else f"exit code {code}"
            self._fail(f"ended during {command!r} ({killed})")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(f"answered {command!r} with {line[:80]!r}, which is no JSON object")
        if "error" in answer:
            self._fail(f"failed at {command!r}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and whatever it has started. Harmless when there is none."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError):  # what it did not read any more cannot be written
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._stderr.seek(0)
        self._stderr.truncate()
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=self._environment,
                start_new_session=True,  # a group of its own, to end all of it
            )
        except OSError as error:
            raise PeerError(f"cannot be started: {error}", peer=self.name) from error
        self._process = process
        self._answers = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, self._answers), daemon=True).start()
        return process

    def _fail(self, what: str) -> NoReturn:
        self.close()
        raise PeerError(what, peer=self.name, stderr=_last_lines(self._stderr))


def child_environment(threads: int) -> dict[str, str]:
    """For processes of other projects: as many threads as everybody has, no network, no Gossamer on the path."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    count = str(threads)
    return own | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


def _read(stdout: IO[str] | None, answers: queue.SimpleQueue[str]) -> None:
    assert stdout is not None
    with contextlib.suppress(ValueError):  # closed while it was read
        for line in stdout:
            answers.put(line)
    answers.put("")


def _last_lines(stderr: IO[bytes]) -> list[str]:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _STDERR_BYTES))
    lines = [line.rstrip() for line in stderr.read().decode(errors="replace").splitlines()]
    return [line for line in lines if line][-_STDERR_LINES:]
