"""A deployment from its check to its end."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import yaml

import gossamer
from gossamer.distributed.nodes import from_the_root, look_at, nodes, places
from gossamer.distributed.serving.app import (
    APPLICATION,
    application_of,
    replica_memory,
)
from gossamer.distributed.serving.keys import api_keys
from gossamer.distributed.serving.settings import DeploymentSettings
from gossamer.errors import ConfigurationError, EngineError
from gossamer.models.resolve import resolve_model
from gossamer.models.weights_digest import weights_digest
from gossamer.options import Options
from gossamer.server.options import ServerOptions
from gossamer.server.run import listen

STARTS_WITHIN = 900.0  # seconds that all replicas have to load the model
IMPORT_PATH = "gossamer.distributed.serving.app:build_app"


@dataclass
class Deployment:
    """What is to be deployed, and what has been."""

    settings: DeploymentSettings

    @classmethod
    def of(cls, model: str, *, engine: dict[str, Any], server: dict[str, Any], **settings: Any) -> Deployment:
        """Checks all that can be known without a cluster.

        Raises:
            GossamerError: there is no such model, or an option is wrong.
        """
        Options.of(engine)
        ServerOptions(**server)
        path = resolve_model(model, as_file=True)
        model, lora, engine = from_the_root(model, settings.pop("lora", {}), engine)
        return cls(
            DeploymentSettings(
                model=model,
                engine=engine,
                lora=lora,
                server=server,
                key=secrets.token_hex(32),
                routing_key=secrets.token_hex(32),
                digest=weights_digest(path),
                version=gossamer.__version__,
                memory=replica_memory(model, engine),
                **settings,
            )
        )

    @property
    def _what(self) -> str:
        return f"replicas of {self.settings.model}"

    def check_machine(self) -> None:
        """Whether this machine alone has room, and the port is free.

        Raises:
            ConfigurationError: it has not, or it is not.
        """
        import psutil

        cpus, memory = os.cpu_count() or 1, psutil.virtual_memory().available
        own = self.settings
        if own.replicas * own.threads > cpus or own.replicas * own.memory > memory:
            raise ConfigurationError(
                f"{own.replicas} {self._what} need {own.threads} CPUs and {own.memory / 1e9:.2f} GB each; this "
                f"machine has {cpus} CPUs and {memory / 1e9:.1f} GB available. Take fewer --replicas or --threads, or "
                "a smaller --memory"
            )
        if own.host is not None:
            listen(own.host, own.port).close()

    def check_cluster(self) -> None:
        """Whether the cluster has room, and this version and this model on every node that may get a replica.

        Raises:
            ConfigurationError: names the node, and what is missing there.
        """
        own = self.settings
        there = [each for each in nodes() if each.cpus >= own.threads]
        room = sum(places(each, cpus=own.threads, memory=own.memory) for each in there)
        if room < own.replicas:
            listed = ", ".join(f"{each.address} has {each.cpus:g} and {each.memory / 1e9:.1f} GB" for each in nodes())
            raise ConfigurationError(
                f"{own.replicas} {self._what} of {own.threads} CPUs and {own.memory / 1e9:.1f} GB each do not fit, "
                f"there is room for {room}: {listed}. Take fewer --replicas or --threads, a smaller --memory, or more "
                "nodes"
            )
        for node, told in zip(there, look_at(there, own.model, own.lora), strict=True):
            if own.digest and told["digest"] != own.digest:
                raise ConfigurationError(
                    f"node {node.address} ({told['host']}) has other weights under the name {own.model} than this "
                    f"machine (SHA-256 {told['digest'][:12]} and {own.digest[:12]}); copy the same files everywhere"
                )

    def start(self) -> str:
        """Deploy, and wait until all replicas answer. Returns the address.

        Raises:
            ConfigurationError: a node does not fit.
            EngineError: a replica or the ingress could not start; nothing is left.
        """
        from ray import serve

        own = self.settings
        self.check_cluster()
        serve.start(proxy_location="Disabled")
        # returns at once: an error of a replica is told better below
        serve.run_many([serve.RunTarget(application_of(own), name=APPLICATION)], wait_for_applications_running=False)
        self._wait_until_running()
        return _wait_until_ready()

    def _wait_until_running(self) -> None:
        from ray import serve

        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            status = serve.status().applications.get(APPLICATION)
            state = "NOT_STARTED" if status is None else status.status.value
            if state == "RUNNING":
                return
            if status is not None and (state == "DEPLOY_FAILED" or time.monotonic() > deadline):
                why = [each.message for each in status.deployments.values() if each.message] or [status.message]
                serve.delete(APPLICATION)
                raise EngineError(f"the deployment has failed: {_reason(why[0])}")
            time.sleep(0.2)

    def wait(self) -> None:
        """Until SIGTERM or SIGINT; then what is running is finished, and everything ends."""
        ended = threading.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda number, frame: ended.set())
        ended.wait()
        self.end()

    def end(self) -> None:
        """Finish what is running, and end."""
        from ray import serve

        serve.delete(APPLICATION)


def _wait_until_ready(timeout: float = 60.0) -> str:
    """Until the ingress knows of replicas. Returns its address.

    Raises:
        EngineError: it does not in time.
        ConfigurationError: it asks nobody for a key, although one is set here.
    """
    from ray import serve

    ingress = serve.get_app_handle(APPLICATION)
    deadline = time.monotonic() + timeout
    while True:
        about = ingress.describe.remote().result(timeout_s=timeout)
        if api_keys() and not about["keys"]:
            serve.delete(APPLICATION)
            raise ConfigurationError(
                "GOSSAMER_API_KEY is set here, but not where the ingress runs, which would let everybody in: set it in "
                "the environment of `ray start` on all nodes, or unset it here"
            )
        if about["state"] == "ready":
            return str(about["address"])
        if time.monotonic() > deadline:
            raise EngineError(f"the deployment runs, but is not ready within {timeout:g} seconds: {about['state']}")
        time.sleep(0.1)


def _reason(message: str) -> str:
    """What an error of a replica says, out of the traceback that Ray tells."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("gossamer.errors.", "ray.exceptions"))]
    return (ours or lines or ["without a reason"])[-1]


def as_config(settings: DeploymentSettings) -> str:
    """The same deployment as a config file of Ray Serve, without keys, which are made anew where it is deployed."""
    fields = asdict(settings)
    for name in ("key", "routing_key", "digest", "version", "memory", "host", "port"):
        fields.pop(name)
    args: dict[str, Any] = {"model": fields.pop("model"), **fields.pop("engine")}
    names = fields["server"].pop("model_names")
    if names[0] != args["model"]:
        args["served_model_name"] = names[0]
    args |= {name: value for name, value in fields.items() if value not in (None, {}, (), [])}
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [{"name": APPLICATION, "route_prefix": "/", "import_path": IMPORT_PATH, "args": _plain(args)}],
    }
    return str(yaml.safe_dump(config, sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value
