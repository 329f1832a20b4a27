"""The Ray Serve application: an ingress in front of replicas.

>>> from gossamer.distributed.serving.app import build_app  # in a Serve config: import_path of the same name
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gossamer
from gossamer.distributed.extra import require_ray
from gossamer.distributed.nodes import PROCESS
from gossamer.distributed.serving.settings import DeploymentSettings, Router
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION = "gossamer"
BUSY = 0.7  # of the sequences that a replica computes at once; beyond it another replica starts
QUEUED_BESIDE = (
    64  # requests that Ray lets through beyond what a replica takes, which says 429 to them in its own words
)
# Seconds between two reports of a replica, which every ingress gets. One that is alone knows more than they do.
REPORTS_OFTEN, REPORTS_RARELY = 1.0, 10.0
MANY_REPLICAS = 100
_ROUTERS = {
    "prefix": "ray_router.PrefixRequestRouter",
    "round-robin": "compared_routers.InTurn",
    "ray": "compared_routers.RaysPrefixRouter",
}


def serve_app(
    model: str,
    *,
    replicas: int = 2,
    max_replicas: int | None = None,
    threads: int = 1,
    ingresses: int = 1,
    host: str | None = None,
    port: int = 8000,
    served_model_name: str | None = None,
    lora: dict[str, str] | None = None,
    server: dict[str, Any] | None = None,
    check_digest: bool = True,
    pinned: Sequence[str] = (),
    router: Router = "prefix",
    trace: str | None = None,
    key: str | None = None,
    routing_key: str | None = None,
    **options: Any,
) -> Application:
    """Replicas of a model behind one address, as an application of Ray Serve.

    Args:
        model: a name, a Hugging Face id, a directory or a GGUF file, which all nodes find by this name.
        replicas, max_replicas, threads, ingresses, host, port, lora, pinned, router, trace: see
            :class:`~gossamer.distributed.serving.settings.DeploymentSettings`; without a host, Ray Serve's own proxies
            take the requests.
        served_model_name: the name in requests and answers; the model's own by default.
        server: more limits, as fields of :class:`~gossamer.server.options.ServerOptions`.
        check_digest: replicas with other weights than this machine's refuse to start.
        key, routing_key: see there; made anew if not given.
        options: of :class:`gossamer.LLM`.

    Raises:
        ConfigurationError: a value is out of its range, or there is no Ray.
        ModelNotFoundError: there is no such model.

    ::

        from ray import serve
        from gossamer.distributed import serve_app

        serve.run(serve_app("smollm2-135m", replicas=2, quantization="int8", memory="1GB"), name="gossamer")
    """
    require_ray()
    settings = DeploymentSettings(
        model=model,
        replicas=replicas,
        max_replicas=max_replicas,
        ingresses=ingresses,
        threads=threads,
        engine=options,
        lora=lora or {},
        server={"model_names": (served_model_name or model,)} | (server or {}),
        host=host,
        port=port,
        key=key or secrets.token_hex(32),
        routing_key=routing_key or secrets.token_hex(32),
        digest=_digest(model) if check_digest else "",
        version=gossamer.__version__,
        memory=replica_memory(model, options),
        pinned=tuple(pinned),
        router=router,
        trace=trace,
    )
    return application_of(settings)


def build_app(args: dict[str, Any]) -> Application:
    """As :func:`serve_app`, for a Serve config file: its ``args`` are the arguments."""
    given = dict(args)
    model = given.pop("model", None)
    if not isinstance(model, str):
        raise ConfigurationError("args need model: the name or the path of the model")
    return serve_app(model, **given)


def application_of(settings: DeploymentSettings) -> Application:
    """The two deployments."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from gossamer.distributed.serving.engine_replica import EngineReplica
    from gossamer.distributed.serving.ingress import Ingress
    from gossamer.server.options import ServerOptions

    limits = ServerOptions(**settings.server)
    at_once = settings.max_num_seqs
    often = settings.ingresses > 1 and settings.most_replicas <= MANY_REPLICAS
    router = RequestRouterConfig(
        request_router_class=f"gossamer.distributed.serving.{_ROUTERS[settings.router]}",
        request_routing_stats_period_s=REPORTS_OFTEN if often else REPORTS_RARELY,
    )
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=max(1.0, BUSY * at_once),
            )
        }
    engine = serve.deployment(EngineReplica).options(
        name="engine",
        max_ongoing_requests=at_once + limits.max_queue + QUEUED_BESIDE,
        graceful_shutdown_timeout_s=limits.drain_timeout + 10.0,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        request_router_config=router,
        ray_actor_options={"num_cpus": settings.threads, "memory": settings.memory},
        **scaling,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=100_000,  # what is too much, replicas say
        graceful_shutdown_timeout_s=limits.drain_timeout + 10.0,
        ray_actor_options={"num_cpus": 0},
    )
    app: Application = ingress.bind(engine.bind(settings), settings)
    return app


def replica_memory(model: str, options: dict[str, Any]) -> int:
    """Bytes that a replica needs: the weights as they are stored, the cache, and what a process takes."""
    from gossamer.models.resolve import resolve_model
    from gossamer.options import Options

    path = resolve_model(model, as_file=True)
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    weights = sum(file.stat().st_size for file in files)
    return weights + Options.of(options).engine.memory_bytes + PROCESS


def _digest(model: str) -> str:
    from gossamer.models.resolve import resolve_model
    from gossamer.models.weights_digest import weights_digest

    path: Path = resolve_model(model, as_file=True)
    return weights_digest(path)
