"""What a deployment is told at its start. Sent to the replicas as it is, so it holds plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gossamer.errors import ConfigurationError
from gossamer.server.options import ServerOptions

Router = Literal["prefix", "round-robin", "ray"]


@dataclass(frozen=True, kw_only=True)
class DeploymentSettings:
    """How to serve a model with several replicas.

    Attributes:
        model: as for ``gossamer serve``; every node has to find it.
        replicas, max_replicas: how many there are; more than ``replicas`` start, up to ``max_replicas``, while more
            requests come than 0.7 of what is computed at once.
        ingresses: processes that take requests and pass them on.
        threads: processors of a replica.
        engine: options of :class:`gossamer.LLM`.
        lora: adapters, name -> directory.
        server: limits and names, as for ``gossamer serve``; keys are not among them, see ``GOSSAMER_API_KEY``.
        host, port: where the ingress listens; ``None`` for a host leaves that to Ray Serve's own proxies.
        pinned: files whose text stays in the cache of every replica.
        key: what the ingress shows to replicas; made anew for every deployment.
        routing_key: of the hashes of prompts, 32 bytes in hexadecimal digits.
        digest, version: of the weights and of Gossamer, which every replica must have; empty for any.
        memory: bytes that a replica needs.
        router: how a replica is chosen: ``prefix`` (ours), or, to compare with, ``round-robin`` or ``ray``, the prefix
            router that Ray has for language models.
        trace: a file for one line per request, without texts, which ``gossamer simulate`` reads.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    model: str
    replicas: int = 2
    max_replicas: int | None = None
    ingresses: int = 1
    threads: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, str] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    host: str | None = "127.0.0.1"
    port: int = 8000
    pinned: tuple[str, ...] = ()
    key: str
    routing_key: str
    digest: str = ""
    version: str = ""
    memory: int = 0
    router: Router = "prefix"
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "ingresses", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.router not in get_args(Router):
            raise ConfigurationError(f"router must be {' or '.join(get_args(Router))}, got {self.router!r}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigurationError(f"max_replicas is {self.max_replicas}, less than the {self.replicas} replicas")

    @property
    def most_replicas(self) -> int:
        """The number that there can be."""
        return self.max_replicas or self.replicas

    @property
    def max_num_seqs(self) -> int:
        """Sequences that a replica computes at once."""
        from gossamer.options import Options

        return Options.of(self.engine).engine.max_num_seqs

    def ingress_options(self, api_keys: tuple[str, ...]) -> ServerOptions:
        """Of the server that clients talk to."""
        return ServerOptions(**self.server, host=self.host or "127.0.0.1", port=self.port, api_keys=api_keys)

    def replica_options(self, host: str, tag: str) -> ServerOptions:
        """Of a replica's own server, which only the ingress talks to."""
        own = {name: value for name, value in self.server.items() if name not in ("allowed_origins", "allowed_hosts")}
        pinned = tuple(map(Path, self.pinned))
        return ServerOptions(
            **own,
            host=host,
            port=0,
            api_keys=(self.key,),
            pinned=pinned,
            behind_front=True,
            tag=tag,
            allowed_hosts=("*",),
        )
