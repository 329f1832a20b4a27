"""Prometheus metrics of a model of embeddings or scores, under the names that generating models have."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class PoolingMetrics:
    """The metrics of one model.

    Args:
        model_name: a label on all of them.
        waiting: how many inputs are not computed yet.
    """

    def __init__(self, model_name: str, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        gauge = Gauge(
            "gossamer:num_inputs_waiting",
            "Inputs that wait or are being computed.",
            ("model_name",),
            registry=self.registry,
        )
        gauge.labels(model_name).set_function(waiting)
        self._requests = self._counter("request_success", "Requests that were answered.")
        self._inputs = self._counter("inputs", "Inputs of them.")
        self._tokens = self._counter("prompt_tokens", "Tokens of the inputs.")
        self._seconds = Histogram(
            "gossamer:e2e_request_latency_seconds",
            "From arrival to the last vector.",
            ("model_name",),
            buckets=_SECONDS,
            registry=self.registry,
        ).labels(model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"gossamer:{name}", text, ("model_name",), registry=self.registry).labels(self._model)

    def count(self, inputs: int, tokens: int, seconds: float) -> None:
        """A request was computed."""
        self._requests.inc()
        self._inputs.inc(inputs)
        self._tokens.inc(tokens)
        self._seconds.observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
