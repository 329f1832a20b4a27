"""Prometheus' text for a whole deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import aiohttp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gossamer.distributed.serving.fleet import Replica

if TYPE_CHECKING:
    from gossamer.distributed.serving.ingress import Ingress

_COUNTERS = {
    "routed": "Requests that replicas were chosen for.",
    "matched_bytes": "Bytes of prompts that the chosen replica was believed to have cached.",
    "prompt_bytes": "Bytes of all prompts, as they are hashed.",
    "all_full": "Times that all candidates had more than their share of requests.",
    "corrected": "Answers that told of less in the cache than was believed.",
    "failed": "Requests that a replica did not answer.",
}


async def fleet_metrics(ingress: Ingress) -> bytes:
    """The metrics of every replica with a label ``replica``, and ``gossamer:router_...`` of this ingress."""
    replicas = ingress.fleet.replicas
    texts = await asyncio.gather(*(_metrics_of(ingress, each) for each in replicas))
    merged: dict[str, Metric] = {}
    for replica, text in zip(replicas, texts, strict=True):
        for family in text_string_to_metric_families(text):
            own = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own.add_sample(sample.name, sample.labels | {"replica": replica.tag}, sample.value, sample.timestamp)
    registry = CollectorRegistry()
    registry.register(_Given([*merged.values(), *_of_routing(ingress.fleet.stats())]))
    return generate_latest(registry)


async def _metrics_of(ingress: Ingress, replica: Replica) -> str:
    headers = {"authorization": f"Bearer {ingress.settings.key}"}
    try:
        async with ingress.client.get(f"{replica.address}/metrics", headers=headers) as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, OSError):
        return ""  # it is ending


def _of_routing(stats: dict[str, Any]) -> Iterator[Metric]:
    for name, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"gossamer:router_{name}", text)
        counter.add_metric([], stats[name])
        yield counter
    for name, text in (("replicas", "Replicas that are known."), ("in_flight", "Requests without an end yet.")):
        gauge = GaugeMetricFamily(f"gossamer:router_{name}", text)
        gauge.add_metric([], stats[name])
        yield gauge


class _Given(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
