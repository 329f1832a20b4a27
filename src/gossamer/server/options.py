"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import ConfigurationError
from gossamer.protocol.response_store import MAX_BYTES


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve a model that is loaded separately.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        model_names: the names that requests may give; the first is the one in answers.
        api_keys: requests must carry one of them; none asks for nothing.
        max_queue: sequences that may wait beside those that are computed; more are told to come back later.
        max_logprobs: log-probabilities of most probable tokens that a request may ask for at each position.
        max_body: bytes of a request's body.
        max_file: bytes of an uploaded file.
        request_timeout: seconds until an answer is given up.
        idle_timeout: seconds that a connection may take to send a request, or between two of them.
        drain_timeout: seconds that running requests have to finish, once the server is told to stop.
        pinned: files whose text is kept in the cache from the start on.
        allowed_origins: web pages of these origins may call the server from a browser.
        allowed_hosts: names of the server besides those of this machine; without any, a server that other machines
            reach has every name. ``*`` takes any.
        data_dir: where files and batches are kept; ``None`` forgets them at the end.
        json_logs: one JSON object per line instead of text.
        response_memory: bytes of answers of ``/v1/responses`` that are kept, to go on from; 0 keeps none.
        behind_front: the only client is another server of ours, which says with ``x-gossamer-owner`` whose request it
            passes on, and with ``x-gossamer-draw`` which random stream one without a seed has.
        tag: part of the ids of what the server keeps, by which a front knows whom to ask for it.
        strict: a field of a request that has no effect here is refused, not named in a header; and so is a call in the
            history of a tool that is not offered.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ("gossamer",)
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    max_logprobs: int = 20
    max_body: int = 8 * 2**20
    max_file: int = 512 * 2**20
    request_timeout: float = 1800.0
    idle_timeout: float = 60.0
    drain_timeout: float = 60.0
    pinned: tuple[Path, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    data_dir: Path | None = None
    json_logs: bool = False
    behind_front: bool = False
    tag: str = ""
    strict: bool = False
    response_memory: int = MAX_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigurationError(f"port must be from 0 to 65535, got {self.port}")
        if not self.model_names or not all(self.model_names):
            raise ConfigurationError("a served model needs a name that is not empty")
        if not all(self.api_keys):
            raise ConfigurationError("an API key must not be empty")
        for name in ("max_queue", "max_body", "max_file", "request_timeout", "idle_timeout", "drain_timeout"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, got {value}")
        if self.response_memory < 0:
            raise ConfigurationError(f"response_memory must be at least 0, got {self.response_memory}")
        if self.max_logprobs < 0:
            raise ConfigurationError(f"max_logprobs must be at least 0, got {self.max_logprobs}")
