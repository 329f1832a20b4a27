"""Programs in processes of their own that need not import what takes seconds, for tests of something else than a start.

They are forked off a process that has imported PyTorch and the server and computes nothing, one for a process of tests.
Like those of ``subprocess`` they end by themselves, with an exit status, or by a signal.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from typing import Any, TextIO

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(
    ["gossamer.cli.app", "gossamer.llm", "gossamer.server", "transformers.models.llama.modeling_llama"]
)


class Program:
    """One that runs: a script as after ``python -c``, and its arguments. What it prints is read from pipes.

    Args:
        script: its source.
        arguments: those in ``sys.argv``.
        environment: all of its variables; ours by default.
    """

    def __init__(self, script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.stdout, out = _pipe()
        self.stderr, err = _pipe()
        # a variable that decides what an import does has to be that of these tests
        given = dict(os.environ if environment is None else environment)
        self._process = _FORKING.Process(target=_Call(script, [str(each) for each in arguments], given, out, err))
        self._process.start()
        os.close(out)
        os.close(err)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal; ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Until it ends.

        Raises:
            TimeoutError: it does not within so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the program has not ended after {timeout} seconds")
        return self._process.exitcode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """All of its output and errors, when it has ended."""
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        reader.start()
        output = self.stdout.read()
        reader.join(timeout)
        self.wait(timeout)
        return output, errors[0]

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(60)
        self.stdout.close()
        self.stderr.close()


def run_program(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    with Program(script, *arguments) as program:
        output, errors = program.communicate(timeout)
        return subprocess.CompletedProcess([script, *arguments], program.wait(), output, errors)


def _pipe() -> tuple[TextIO, int]:
    ours, theirs = os.pipe()
    return open(ours, encoding="utf-8"), theirs


class _Call:
    """What the process does. Its ends of the pipes go with it when it is pickled for the process."""

    def __init__(self, script: str, arguments: list[str], environment: dict[str, str], out: int, err: int) -> None:
        self.script, self.arguments, self.environment = script, arguments, environment
        self.pipes = {1: out, 2: err}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"pipes": {number: DupFd(pipe) for number, pipe in self.pipes.items()}}

    def __call__(self) -> None:
        for number, pipe in self.pipes.items():
            ours = pipe.detach()  # type: ignore[attr-defined]  # a DupFd here
            os.dup2(ours, number)
            os.close(ours)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv = ["-c", *self.arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell has pytest ignore Ctrl-C
        exec(compile(self.script, "<script>", "exec"), {"__name__": "__main__"})
