"""What clients talk to: checks requests, chooses a replica for each, and passes its answer on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import aiohttp
from ray.serve.exceptions import RayServeException

from gossamer.distributed.routing.chain import ChainHasher
from gossamer.distributed.serving.fleet import Fleet, Replica, fleet_of
from gossamer.distributed.serving.keys import api_keys
from gossamer.distributed.serving.prompts import RoutedPrompt
from gossamer.distributed.serving.settings import DeploymentSettings
from gossamer.errors import EngineError, GossamerError
from gossamer.server.errors import unavailable
from gossamer.server.run import GRACE, Server, listen, make_server

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

logger = logging.getLogger("gossamer.server")
LEASE_ENDS_WITHIN = 5.0  # seconds after the answer
HOT_PREFIXES = 64  # that each replica is asked for
LOOKS_EVERY = 0.5  # seconds between two looks at which replicas there are


class Ingress:
    """Behind the application of :func:`~gossamer.distributed.serving.ingress_app.create_ingress_app`.

    One object is two things: what Ray Serve runs, and the life of the server, as in :class:`gossamer.server.run.Life`.

    Args:
        engine: the deployment of replicas.
        settings: see there.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, engine: DeploymentHandle, settings: DeploymentSettings
    ) -> None:
        from ray import serve

        from gossamer.distributed.serving.pins import Pins
        from gossamer.distributed.serving.request_trace import RequestTrace

        application = serve.get_replica_context().app_name
        self.settings = settings
        self.options = settings.ingress_options(api_keys())
        self.state, self.reason = "loading", "no replica is ready"
        self.loaded, self.failed = asyncio.Event(), asyncio.Event()
        self.bodies = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self.hasher = ChainHasher(bytes.fromhex(settings.routing_key))
        self.fleet: Fleet = fleet_of(application)
        self.fleet.is_one_of_several = settings.ingresses > 1
        self.pins = Pins(self)
        self.trace = RequestTrace(settings.trace, self.options.model_names[0]) if settings.trace else None
        self.client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
        )
        self._engine = engine.options(method_name="hold")
        self._all = engine
        self._look = asyncio.create_task(self._look_after())
        self._settling: set[asyncio.Task[None]] = set()
        self._server: Server | None = None
        if settings.host is not None:
            self._server = make_server(self.app, self.options)
            listening = listen(settings.host, settings.port, shared=settings.ingresses > 1)
            self._serving = asyncio.create_task(self._server.serve([listening]))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, for Ray Serve."""
        return self.app

    @property
    def app(self) -> Any:
        """The application."""
        from gossamer.distributed.serving.ingress_app import create_ingress_app

        if not hasattr(self, "_app"):
            self._app = create_ingress_app(self)
        return self._app

    async def describe(self) -> dict[str, Any]:
        """Where it listens, whether it answers, and how many keys it knows; for whoever deploys it."""
        import ray

        host, port = self.settings.host, self.settings.port
        if host in ("0.0.0.0", "::"):
            host = ray.util.get_node_ip_address()
        return {
            "address": None if host is None else f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
            "state": self.state,
            "replicas": len(self.fleet.replicas),
            "keys": len(self.options.api_keys),
        }

    # --- its life ----------------------------------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        return self.state == "loading"

    def drain(self) -> None:
        """From now on take no more requests."""
        self.state, self.reason = "draining", "the server is shutting down"

    async def stop(self) -> None:
        """Nothing is computed here."""

    def check_health(self) -> None:
        """Of the process, for Ray Serve: it is well even if no replica is."""
        if self._server is not None and self._serving.done():
            raise EngineError("the ingress does not listen any more")

    def check_ready(self) -> None:
        """Whether requests are answered.

        Raises:
            HttpError: and why not.
        """
        if self.state != "ready":
            raise unavailable(f"{self.state}: {self.reason}")

    async def _look_after(self) -> None:
        """Learns of replicas as they come and go: what they have cached, and what must be pinned there."""
        known: set[str] = set()
        while True:
            try:
                replicas = self.fleet.replicas
                if new := [each for each in replicas if each.id not in known]:
                    await self._greet(new)
                known = {each.id for each in replicas}
                if self.state != "draining":
                    self.state = "ready" if replicas else "loading"
                if replicas:
                    self.loaded.set()
            except Exception:  # the next look may do better
                logger.exception("replicas could not be asked")
            await asyncio.sleep(LOOKS_EVERY)

    async def _greet(self, new: list[Replica]) -> None:
        with suppress(Exception):  # one of them may end just now; what is not learned costs some cache hits only
            for tag, chains in await self._all.broadcast("hot_prefixes", HOT_PREFIXES).results_async(timeout_s=10):
                if tag in {each.tag for each in new}:
                    self.fleet.learn(tag, chains)
        for replica in new:
            await self.pins.restore(replica)

    async def __del__(self) -> None:
        """At the end: Ray Serve does not know of the streams that come by the listener, and would not wait for them."""
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.wait([self._serving], timeout=self.options.drain_timeout + GRACE)
        self._look.cancel()
        await self.client.close()

    # --- requests ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, prompt: RoutedPrompt, avoid: tuple[str, ...] = ()) -> AsyncIterator[Lease]:
        """A place at the best replica for a prompt, for as long as the block lasts.

        Raises:
            GossamerError: there is no replica.
        """
        lease_id = uuid.uuid4().hex
        kept_by = None if prompt.tag is None else self.fleet.tagged(prompt.tag)
        narrowed: dict[str, Any] = {"only": None if kept_by is None else kept_by.id, "avoid": avoid}
        if prompt.text:
            narrowed["text"] = prompt.text
        arguments = (lease_id, prompt.chain, prompt.size)
        stack = AsyncExitStack()
        try:
            selection = await stack.enter_async_context(self._engine.choose_replica(*arguments, **narrowed))
        except BaseException as error:
            self.fleet.failed(lease_id)
            if isinstance(error, RayServeException):
                raise unavailable(f"there is no replica: {error}") from None
            raise
        lease = Lease(self.fleet, lease_id, selection.replica_id, selection.replica_metadata["address"])
        self.fleet.routed(lease_id, lease.replica, prompt.chain, prompt.size)
        held = self._engine.dispatch(selection, *arguments)
        try:
            yield lease
        except GossamerError:
            self.fleet.failed(lease_id)
            raise
        finally:
            # Whoever waits for the answer may be cancelled, and the lease ends nevertheless.
            settling = asyncio.create_task(self._settle(lease, held, stack))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    async def _settle(self, lease: Lease, held: Any, stack: AsyncExitStack) -> None:
        """Learn what an answer took, and give its place back."""
        async with stack:
            try:
                async with asyncio.timeout(LEASE_ENDS_WITHIN):
                    lease.usage = await held
            except Exception:  # the replica is gone, or does not say
                held.cancel()
            self.fleet.completed(lease.id, lease.usage)


class Lease:
    """A place at a replica.

    Attributes:
        id: what the request that has it says in a header.
        replica, address: whose it is, and where that is.
        usage: what the answer took, once the lease has ended.
        first_token_at: when it began, in seconds of ``time.monotonic``.
    """

    def __init__(self, fleet: Fleet, id: str, replica: str, address: str) -> None:
        self.id, self.replica, self.address = id, replica, address
        self.usage: dict[str, Any] | None = None
        self.first_token_at: float | None = None
        self._fleet = fleet

    def first_token(self) -> None:
        """The answer has begun."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
            self._fleet.first_token(self.id)
