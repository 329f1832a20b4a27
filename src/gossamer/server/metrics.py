"""Prometheus metrics: vLLM's names under our prefix, so that dashboards carry over, and what shared prefixes save."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gossamer.engine.engine import Engine
from gossamer.engine.results import Output
from gossamer.engine.speculation.speculator import Speculator
from gossamer.engine.speculation.survival import Source
from gossamer.outputs import RequestOutput

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """The metrics of one engine.

    Args:
        engine: read when the metrics are asked for; its numbers need no lock.
        model_name: a label on all of them.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(engine, model_name))
        self._model = model_name
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._interval = self._histogram("inter_token_latency_seconds", "Between two tokens of a completion.")
        self._end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queued = self._histogram("request_queue_time_seconds", "From arrival to the first memory.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first memory to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self._inference = self._histogram("request_inference_time_seconds", "From the first memory to the last token.")
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Between two tokens, on average over a request."
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Tokens of all completions.", _TOKENS)
        self._longest = self._histogram("request_max_num_generation_tokens", "Of the longest completion.", _TOKENS)
        self._n = self._histogram("request_params_n", "Completions that were asked for.", (1, 2, 5, 10, 20))
        self._limit = self._histogram("request_params_max_tokens", "The limit, of requests that have one.", _TOKENS)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens computed in one step.", _TOKENS)
        labels = ("model_name", "finished_reason")  # of these alone, the name may be an adapter's
        self._success = Counter("gossamer:request_success", "Requests that ended.", labels, registry=self.registry)
        self._computed = 0
        self._engine = engine
        engine.emission.on_token = self._interval.observe

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        metric = Histogram(f"gossamer:{name}", text, ("model_name",), buckets=buckets, registry=self.registry)
        return metric.labels(self._model)

    def count_outputs(self, outputs: Iterable[Output]) -> None:
        """After a step, in the engine's thread."""
        computed = self._engine.stats.computed_tokens
        if computed > self._computed:
            self._iteration.observe(computed - self._computed)
            self._computed = computed
        for output in outputs:
            if isinstance(output, RequestOutput) and output.finished:
                self._count_finished(output)

    def _count_finished(self, output: RequestOutput) -> None:
        reasons = [each.finish_reason for each in output.outputs] if output.error is None else ["error"]
        for reason in reasons:
            self._success.labels(output.adapter or self._model, reason or "abort").inc()
        times = output.metrics
        if times is None or output.error is not None:
            return
        self._prompt.observe(len(output.prompt_token_ids))
        self._generated.observe(sum(len(each.token_ids) for each in output.outputs))
        counts = [len(each.token_ids) for each in output.outputs]
        self._longest.observe(max(counts, default=0))
        self._n.observe(len(counts))
        if times.max_tokens is not None:
            self._limit.observe(times.max_tokens)
        now = time.perf_counter()
        admitted, first, last = times.admitted or now, times.first_token or now, times.last_token or now
        self._queued.observe(admitted - times.arrived)
        self._prefill.observe(first - admitted)
        self._first_token.observe(first - times.arrived)
        self._decode.observe(last - first)
        self._inference.observe(last - admitted)
        if max(counts, default=0) > 1:
            self._per_token.observe((last - first) / (max(counts) - 1))
        self._end_to_end.observe(last - times.arrived)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    """Counters and gauges that the engine keeps anyway."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        running = len(engine.scheduler.active)
        gauges = {
            "num_requests_running": ("Sequences that hold memory.", running),
            "num_requests_waiting": ("Sequences that wait for memory.", len(engine.scheduler.waiting)),
            "kv_cache_usage_perc": (
                "Share of the memory budget in use, 0 to 1.",
                engine.budget.used / engine.budget.total,
            ),
            "kv_cache_bytes": ("Bytes of keys and values in use.", engine.budget.used),
        }
        counters = {
            "prefix_cache_queries": ("Tokens of prompts, looked up in the prefix tree.", stats.prompt_tokens),
            "prefix_cache_hits": ("Those that were there.", stats.saved_tokens),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "num_preemptions": ("Sequences that had to give their memory back.", stats.preemptions),
            "prefix_tokens_saved": ("Tokens not computed, because another had computed them.", stats.saved_tokens),
            "evicted_tokens": ("Tokens whose keys and values were dropped for others.", stats.evicted_tokens),
            "steps": ("Forward passes.", stats.steps),
            "shared_attention_steps": ("Those in which sequences attended to a prefix together.", stats.shared_steps),
            "attention_keys_read": ("Keys per layer that attention read.", stats.keys_read),
            "attention_keys_unshared": ("Keys it would have read without sharing.", stats.keys_unshared),
            "forward_seconds": ("Time in forward passes.", stats.forward_seconds),
            "failed_requests": ("Requests that ended with an error.", stats.failed_requests),
        }
        if engine.store is not None:
            disk = engine.store.stats
            gauges["prefix_disk_files"] = ("Prefix files of this model in --prefix-dir.", len(engine.store))
            counters |= {
                "prefix_disk_hits": ("Tokens of prompts whose keys and values were read.", disk.restored_tokens),
                "prefix_disk_files_read": ("Prefix files read.", disk.read_files),
                "prefix_disk_files_written": ("Prefix files written.", disk.written_files),
                "prefix_disk_bytes_written": ("Bytes of those files.", disk.written_bytes),
                "prefix_disk_write_failures": ("Prefix files that could not be written.", disk.write_failures),
                "prefix_disk_files_skipped": ("Not written, as too many were waiting.", disk.skipped_files),
                "prefix_disk_files_unusable": ("Damaged, or of other models.", disk.unusable_files),
            }
        if engine.speculator is not None:
            yield from self._drafts(engine.speculator)
        for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in families.items():
                family = kind(f"gossamer:{name}", text, labels=("model_name",))
                family.add_metric((self._model,), value)
                yield family

    def _drafts(self, speculator: Speculator) -> Iterator[Metric]:
        """Of speculation: vLLM's names and, for each source, ours."""
        stats, by_source = speculator.stats, ("model_name", "source")
        counts = {
            "spec_decode_num_drafts": ("Drafts that were verified.", stats.drafts),
            "spec_decode_num_draft_tokens": ("Their tokens.", stats.draft_tokens.total()),
            "spec_decode_num_accepted_tokens": ("Those of them that were right.", stats.accepted_tokens.total()),
            "spec_decode_lookup_seconds": ("Time spent on finding and choosing drafts.", stats.lookup_seconds),
        }
        for name, (text, value) in counts.items():
            family = CounterMetricFamily(f"gossamer:{name}", text, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
        position = CounterMetricFamily(
            "gossamer:spec_decode_num_accepted_tokens_per_pos",
            "Right tokens by their place in the draft.",
            labels=("model_name", "position"),
        )
        for place, value in enumerate(list(stats.per_position)):
            position.add_metric((self._model, str(place)), value)
        yield position
        for name, text, counter in (
            ("spec_decode_source_draft_tokens", "Tokens of drafts, by where they stood.", stats.draft_tokens),
            ("spec_decode_source_accepted_tokens", "Right ones, by where they stood.", stats.accepted_tokens),
        ):
            family = CounterMetricFamily(f"gossamer:{name}", text, labels=by_source)
            for source in Source:
                family.add_metric((self._model, source.label), counter[source])
            yield family
        index = GaugeMetricFamily(
            "gossamer:spec_decode_index_bytes", "Bytes of what drafts are looked up in.", labels=("model_name",)
        )
        index.add_metric((self._model,), stats.index_bytes)
        yield index
