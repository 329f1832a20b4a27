"""A replica: an engine and its HTTP server, in an actor that Ray Serve watches."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gossamer
from gossamer.distributed.serving.leases import Leases
from gossamer.distributed.serving.settings import DeploymentSettings
from gossamer.errors import ConfigurationError, EngineError
from gossamer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gossamer import LLM
    from gossamer.engine.engine import Engine
    from gossamer.server.service import Service

logger = logging.getLogger("gossamer.server")
CHAINS_KEPT = 1024  # of prompts that came last
NO_STEP_FOR = 60.0  # seconds with work, after which the engine counts as hanging
TIMED_TOKENS = 256  # of the prompt that is timed at the start


class EngineReplica:
    """See the module's documentation; the methods are called by Ray Serve, and :meth:`hold` by the ingress.

    Args:
        settings: see there.
    """

    async def __init__(self, settings: DeploymentSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        import ray
        from ray import serve

        self.settings = settings
        self.leases = Leases()
        self._chains: OrderedDict[tuple[int, ...], int] = OrderedDict()  # and the bytes of their prompts
        self._speed = 0.0
        self._last_step = (0, time.monotonic())
        self._check_version()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self.tag = "r" + hashlib.blake2b(replica_id.encode(), digest_size=4).hexdigest()
        await self._start_server(ray.util.get_node_ip_address())

    def _check_version(self) -> None:
        wanted = self.settings.version
        if wanted and wanted != gossamer.__version__:
            raise ConfigurationError(
                f"this node has Gossamer {gossamer.__version__}, and the deployment is of {wanted}: install the same "
                "version on all nodes"
            )

    async def _start_server(self, host: str) -> None:
        """Load the model, and listen on a free port of this address.

        Raises:
            ConfigurationError: the model is another one here, or the options are wrong.
            EngineError: it cannot be loaded; the log says why.
        """
        from gossamer.server.app import create_app
        from gossamer.server.run import listen, make_server

        options = self.settings.replica_options(host, self.tag)
        self._failure: Exception | None = None
        app = create_app(self._load, options)
        app.add_middleware(self.leases.around)
        self._server = make_server(app, options)
        self._serving = asyncio.create_task(self._server.serve([listen(host, 0)]))
        while not hasattr(app.state, "service"):
            await asyncio.sleep(0.01)
        self.service: Service = app.state.service
        waits = [asyncio.ensure_future(each.wait()) for each in (self.service.loaded, self.service.failed)]
        await asyncio.wait([*waits, self._serving], return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        if not self.service.loaded.is_set():
            raise self._failure or EngineError("the model could not be loaded; the log of the replica says why")

    def _load(self) -> LLM:
        """The model, as it is to be everywhere. Runs in a thread."""
        import torch

        from gossamer import LLM
        from gossamer.models.resolve import resolve_model
        from gossamer.models.weights_digest import weights_digest

        try:
            if self.settings.digest:
                path = resolve_model(self.settings.model, as_file=True)
                if weights_digest(path) != self.settings.digest:
                    raise ConfigurationError(
                        f"{self.settings.model} on node {os.uname().nodename} ({path}) has other weights than where "
                        "the deployment was started; copy the same files to all nodes"
                    )
            torch.set_num_threads(self.settings.threads)
            llm = LLM(self.settings.model, lora=self.settings.lora, **self.settings.engine)
            if llm.generates:
                self._speed = prefill_speed(llm)
            return llm
        except Exception as error:  # models can raise anything; kept, so that it is told in its own words
            self._failure = error
            raise

    # --- what the ingress asks ---------------------------------------------------------------------------------

    async def hold(self, lease_id: str, chain: Sequence[int], size: int) -> dict[str, Any] | None:
        """Until the request with this lease has been answered; returns the ``usage`` of the answer.

        Args:
            chain, size: of its prompt, as for :class:`~gossamer.distributed.routing.policy.PrefixRouter`.
        """
        usage = await self.leases.hold(lease_id)
        if usage is not None and chain:
            self._chains[tuple(chain)] = size
            self._chains.move_to_end(tuple(chain))
            while len(self._chains) > CHAINS_KEPT:
                self._chains.popitem(last=False)
        return usage

    async def hot_prefixes(self, most: int) -> tuple[str, list[tuple[tuple[int, ...], int]]]:
        """The tag of this replica, and the chains of its last prompts with their sizes, for an ingress that begins."""
        return self.tag, list(self._chains.items())[-most:]

    # --- what Ray Serve asks -----------------------------------------------------------------------------------

    def record_replica_metadata(self) -> dict[str, Any]:
        """What does not change: where requests go, and how fast prompts are computed, in tokens per second."""
        return {"address": self._server.address, "tag": self.tag, "speed": self._speed}

    async def record_routing_stats(self) -> dict[str, Any]:
        """What changes, in few bytes, as every router hears of it: requests in flight, and prompt tokens to compute."""
        loop = self.service.ready.engine_loop
        waiting = await loop.call(waiting_tokens) if loop.num_sequences else 0
        return {"running": loop.num_sequences, "queued": waiting}

    async def check_health(self) -> None:
        """Whether the engine goes on.

        Raises:
            EngineError: it has stopped, or makes no step although there is work.
        """
        if self.service.state == "failed":
            raise EngineError(f"the engine has stopped: {self.service.reason}")
        if self.service.state != "ready" or not self.service.ready.llm.generates:
            return
        loop, now = self.service.ready.engine_loop, time.monotonic()
        steps = loop.engine.stats.steps
        if steps != self._last_step[0] or not loop.num_sequences:
            self._last_step = steps, now
        elif now - self._last_step[1] > NO_STEP_FOR:
            raise EngineError(f"the engine has made no step for {now - self._last_step[1]:.0f} seconds")

    async def __del__(self) -> None:
        """At the end, when Ray Serve has waited for the leases."""
        if hasattr(self, "_serving"):
            self._server.should_exit = True
            await asyncio.wait([self._serving], timeout=self.settings.server.get("drain_timeout", 60.0))


def waiting_tokens(engine: Engine) -> int:
    """Prompt tokens that are still to be computed."""
    scheduler = engine.scheduler
    begun = sum(max(each.num_to_compute - each.num_computed, 0) for each in scheduler.active)
    return begun + sum(each.num_to_compute for each in scheduler.waiting)


def prefill_speed(llm: LLM) -> float:
    """Prompt tokens per second, of a prompt that nothing is known of; the second of two is timed."""
    engine = llm.engine
    length = min(TIMED_TOKENS, engine.max_model_len - 1)
    ids = [7 + 31 * place % (engine.intake.vocab_size - 7) for place in range(length)]
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    seconds = 0.0
    for _ in range(2):
        engine.tree.evict(engine.budget.total)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids}], once, False)
        seconds = time.perf_counter() - start
    engine.tree.evict(engine.budget.total)
    engine.reset_stats()
    return length / seconds
