"""What answers a load: our server, other projects' servers, servers that run already, our engine without a server."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedConfig

from gossamer.bench.peers.contest import numbers_per_token
from gossamer.bench.peers.process import Peer, child_environment
from gossamer.bench.peers.registry import ENVIRONMENTS
from gossamer.bench.peers.servers import SERVERS, ServerSetting
from gossamer.bench.serve_load import Load, LoadResult, Prompts, run_load
from gossamer.bench.server_process import ServerProcess, free_port, get
from gossamer.errors import ConfigurationError, GossamerError, PeerError

OURS, OFFLINE = "gossamer", "offline"
OFFLINE_SCRIPT = Path(__file__).with_name("serve_offline.py")
_SPARE = 64  # tokens that a text may become more than it was cut from
Run = Callable[[Load, int], LoadResult]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Who takes part, and what each is told.

    Attributes:
        threads: CPU threads of each.
        quantization: of our server and engine: ``"int8"``, or ``"none"`` for the model as it is; ``"auto"`` takes a
            GGUF file as it is, and makes anything else int8.
        memory: their budget for keys and values.
        max_num_batched_tokens: their tokens per forward pass.
        offline: measure our engine without a server too.
        peers: names of :data:`gossamer.bench.peers.servers.SERVERS`.
        environments: the directory that has an environment for each of them.
        urls: servers that run already, by the name they get in the table.
        start_timeout: seconds until a server must be ready.

    Raises:
        ConfigurationError: a value has no meaning, or a name stands for two servers.
    """

    threads: int
    quantization: str = "auto"
    memory: str = "4GB"
    max_num_batched_tokens: int = 256
    offline: bool = True
    peers: tuple[str, ...] = ()
    environments: Path = ENVIRONMENTS
    urls: dict[str, str] = field(default_factory=dict)
    start_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.quantization not in ("auto", "int8", "none"):
            raise ConfigurationError(f"quantization must be auto, int8 or none, got {self.quantization!r}")
        if twice := set(self.urls) & {OURS, OFFLINE, *SERVERS}:
            raise ConfigurationError(f"a server at an address needs another name than {min(twice)!r}, which is taken")


@dataclass
class Contestant:
    """One of them.

    Attributes:
        name: in the table.
        run: answers a load whose first prompt has this number; ``None`` if it could not be started.
        cpu_seconds: processor time of its processes so far, where that can be known.
        command, version, weights: what runs, for the record.
        error: why it takes no part (any more).
        ended: whether it ended by itself when it was told to; ``None`` before, and for what we did not start.
    """

    name: str
    run: Run | None = None
    cpu_seconds: Callable[[], float | None] = lambda: None
    command: str | None = None
    version: str | None = None
    weights: str | None = None
    error: str | None = None
    ended: bool | None = None


@dataclass(frozen=True)
class Contest:
    """What all contestants have in common."""

    model: str
    path: Path
    config: PreTrainedConfig
    load: Load
    prompts: Prompts
    options: ServeOptions
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        longest = self.config.get_text_config().max_position_embeddings
        load = self.load
        if load.prefix + load.suffix + load.new > longest:
            raise ConfigurationError(
                f"{load.prefix} + {load.suffix} + {load.new} tokens do not fit into the context of {self.model}, "
                f"which is {longest}"
            )

    @property
    def quantization(self) -> str | None:
        """What our server and engine are asked for."""
        given = self.options.quantization
        int8 = given == "int8" or (given == "auto" and not self.path.is_file())
        return "int8" if int8 else None

    @contextmanager
    def ours(self) -> Iterator[Contestant]:
        """Our server."""
        options = self.options
        command = [sys.executable, "-c", "from gossamer.cli.app import main; main()", "serve", self.model]
        arguments = ["--port", "0", "--log-format", "text", "--memory", options.memory]
        arguments += ["--max-num-seqs", str(self.load.clients)]
        arguments += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
        if self.quantization is not None:
            arguments += ["--quantization", self.quantization]
        contestant = Contestant(OURS, weights=self.quantization or "as they are")
        contestant.command = shlex.join(["gossamer", "serve", self.model, *arguments])
        environment = os.environ | child_environment(options.threads)
        with self._server(contestant, "/health", lambda: ServerProcess(OURS, [*command, *arguments], environment)):
            yield contestant

    @contextmanager
    def peer(self, name: str) -> Iterator[Contestant]:
        """Another project's server."""
        kind = SERVERS[name]
        contestant = Contestant(name)

        def start() -> ServerProcess:
            setting = self._setting()
            found = kind.start(setting)
            contestant.command, contestant.weights = shlex.join(found.command), found.weights
            contestant.version = found.find_version()
            environment = child_environment(self.options.threads) | found.environment
            url = None if found.announced else f"http://127.0.0.1:{setting.port}"
            return ServerProcess(name, found.command, environment, url)

        with self._server(contestant, kind.ready, start):
            yield contestant

    @contextmanager
    def at(self, name: str, url: str) -> Iterator[Contestant]:
        """A server that runs already."""
        contestant = Contestant(name, command=url)
        try:
            contestant.run = self._run(name, url, None)
        except GossamerError as error:
            contestant.error = str(error)
        yield contestant

    @contextmanager
    def offline(self) -> Iterator[Contestant]:
        """Our engine, asked for everything at once; as many sequences as there are clients run at a time."""
        options, load = self.options, self.load
        arguments = {
            "quantization": self.quantization,
            "memory": options.memory,
            "max_num_seqs": load.clients,
            "max_num_batched_tokens": options.max_num_batched_tokens,
        }
        contestant = Contestant(OFFLINE, weights=self.quantization or "as they are")
        contestant.command = f"LLM({self.model!r}, {', '.join(f'{k}={v!r}' for k, v in arguments.items())}).generate"
        peer = Peer(OFFLINE, sys.executable, OFFLINE_SCRIPT, threads=options.threads, timeout=options.start_timeout)

        def run(load: Load, first: int) -> LoadResult:
            assert load.requests is not None
            numbers = range(first, first + load.requests)
            peer.timeout = load.timeout
            told = peer.request("generate", prompts=[self.prompts[number] for number in numbers], new=load.new)
            result = LoadResult(duration=told["seconds"], asked=len(numbers), completed=len(numbers))
            result.completion_tokens, result.prompt_tokens = told["completion_tokens"], told["prompt_tokens"]
            result.cached_tokens = told["cached_tokens"]
            return result

        try:
            self.progress(f"{OFFLINE}: loading")
            peer.request("load", model=self.model, **arguments)
            contestant.run = run
        except GossamerError as error:
            contestant.error = str(error)
        except BaseException:
            peer.close()
            raise
        try:
            yield contestant
        finally:
            peer.close()

    @contextmanager
    def _server(self, contestant: Contestant, ready: str, start: Callable[[], ServerProcess]) -> Iterator[None]:
        """A server that runs as long as the block, if it can be started."""
        name = contestant.name
        with ExitStack() as stack:
            try:
                self.progress(f"{name}: starting")
                server = start()
                stack.callback(lambda: setattr(contestant, "ended", server.stop()))
                server.wait_ready(ready, self.options.start_timeout)
                contestant.run = self._run(name, server.url, server)
                contestant.cpu_seconds = server.cpu_seconds
            except PeerError as error:
                contestant.error = str(error)
            except GossamerError as error:  # says nothing of whom it concerns, such as a model that has no GGUF
                contestant.error = f"{name}: {error}"
            yield

    def _run(self, name: str, url: str, server: ServerProcess | None) -> Run:
        """A function that puts a load on a server."""
        model = _model_name(name, url)

        def run(load: Load, first: int) -> LoadResult:
            result = run_load(
                url,
                load,
                self.prompts,
                model=model,
                first=first,
                pid=None if server is None else server.pid,
                progress=lambda note: self.progress(f"{name}: {note}"),
            )
            if server is not None:
                server.check()
            return result

        return run

    def _setting(self) -> ServerSetting:
        load = self.load
        context = load.prefix + load.suffix + load.new + _SPARE
        numbers = numbers_per_token(SimpleNamespace(config=self.config))
        return ServerSetting(
            model=self.path,
            environments=self.options.environments,
            threads=self.options.threads,
            clients=load.clients,
            context=context,
            cache_bytes=2 * numbers * (load.num_prefixes * load.prefix + load.clients * (context - load.prefix)),
            port=free_port(),
        )


def _model_name(name: str, url: str) -> str:
    """The first model that a server has.

    Raises:
        PeerError: it does not tell.
    """
    response = get(url, "/v1/models")
    if response is None:
        raise PeerError(f"cannot be reached at {url}", peer=name)
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise PeerError(f"does not say at {url}/v1/models which model it has", peer=name) from None
