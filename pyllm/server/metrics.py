"""Prometheus metrics, named as vLLM's with `pyllm:` in front."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pyllm.engine.engine import Engine
from pyllm.engine.outputs import FINISH_REASONS
from pyllm.server.engine_thread import Generation

_LATENCY = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_PER_TOKEN = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """What happened to requests, observed as they end; what the engine counts itself is read when somebody asks."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(engine, model))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model)

        self._first = histogram("pyllm:time_to_first_token_seconds", "From arrival to the first token.", _LATENCY)
        self._each = histogram(
            "pyllm:time_per_output_token_seconds", "Mean of one prompt's tokens after its first.", _PER_TOKEN
        )
        self._whole = histogram("pyllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY)
        self._prompts = Counter(
            "pyllm:prompt_tokens", "Prompt tokens of requests that ended.", ["model_name"], registry=self._registry
        ).labels(model)
        reasons = Counter(
            "pyllm:request_success",
            "Completions that ended, by their reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._reasons = {reason: reasons.labels(model, reason) for reason in FINISH_REASONS}

    def ended(self, generation: Generation) -> None:
        """Count a generation that ended."""
        for request, times in zip(generation.requests, generation.times, strict=False):
            self._prompts.inc(len(request.prompt_ids))
            for completion in request.completions:
                self._reasons[completion.output.finish_reason or "error"].inc()
            if times.first is None:
                continue
            self._first.observe(times.first - times.arrival)
            if times.end is not None:
                tokens = max(len(completion.output.token_ids) for completion in request.completions)
                self._whole.observe(times.end - times.arrival)
                if tokens > 1:
                    self._each.observe((times.end - times.first) / (tokens - 1))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """Read from the engine, whose numbers may move by a step while they are read."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        stats, scheduler = self._engine.stats, self._engine.scheduler
        pool = scheduler.pool
        gauges = {
            "num_requests_running": (len(scheduler.running), "Completions that run."),
            "num_requests_waiting": (len(scheduler.waiting), "Completions that wait."),
            "kv_cache_usage_perc": (1 - pool.free / pool.size, "Share of the cache's blocks in use, 0 to 1."),
        }
        counters = {
            "prefix_cache_queries": (scheduler.prefix_queries, "Tokens looked for in the prefix cache."),
            "prefix_cache_hits": (scheduler.prefix_hits, "Tokens found in the prefix cache."),
            "generation_tokens": (stats.generated_tokens, "Tokens generated."),
            "num_preemptions": (scheduler.preemptions, "Completions put back for want of blocks."),
        }
        for name, (value, text) in gauges.items():
            gauge = GaugeMetricFamily(f"pyllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (value, text) in counters.items():
            counter = CounterMetricFamily(f"pyllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
