"""Prometheus metrics: the engine's figures, read when they are asked for, and times of finished requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.engine.async_llm import AsyncLLM
from core.engine.outputs import RequestOutput

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

_GAUGES = {
    "num_requests_running": ("num_running", "sequences that are running"),
    "num_requests_waiting": ("num_waiting", "requests that wait for a slot"),
    "kv_blocks_total": ("blocks_total", "KV blocks of the pools"),
    "kv_blocks_used": ("blocks_used", "KV blocks that running sequences hold"),
    "kv_blocks_shared": ("blocks_shared", "KV blocks that several sequences hold"),
    "kv_blocks_cached": ("blocks_cached", "free KV blocks that still hold a cached prefix"),
}
_COUNTERS = {
    "steps": ("steps", "steps that were run"),
    "scheduled_tokens": ("scheduled_tokens", "tokens that were computed"),
    "cached_prompt_tokens": ("cached_tokens", "prompt tokens found in the prefix cache"),
    "preemptions": ("preemptions", "sequences whose blocks were taken for others"),
    "prefix_cache_queries": ("prefix_query_tokens", "tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hit_tokens", "tokens found in the prefix cache"),
    "prompt_tokens": ("prompt_tokens", "prompt tokens of requests taken"),
    "generation_tokens": ("generated_tokens", "tokens generated"),
}


class ServerMetrics:
    """A registry of its own, so that several servers of a process do not meet."""

    def __init__(self, engine: AsyncLLM, model_name: str) -> None:
        from prometheus_client import CollectorRegistry, Histogram

        self._engine = engine
        self._labels = {"model_name": model_name}
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            made = Histogram(f"core_{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "from arrival to the first token", _SECONDS)
        self._each = histogram(
            "time_per_output_token_seconds", "mean of a request after the first", _TOKEN_SECONDS
        )
        self._total = histogram("e2e_request_latency_seconds", "from arrival to the end", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self._output = histogram("request_generation_tokens", "output tokens of a request", _TOKENS)

    def finished(self, output: RequestOutput) -> None:
        """Count a request that ended."""
        count = sum(len(c.token_ids) for c in output.outputs)
        first, total = output.metrics.first_token_s, output.metrics.total_s
        self._prompt.observe(len(output.prompt_token_ids))
        self._output.observe(count)
        if first is not None:
            self._first.observe(first)
        if total is not None:
            self._total.observe(total)
            longest = max((len(c.token_ids) for c in output.outputs), default=0)
            if first is not None and longest > 1:
                self._each.observe((total - first) / (longest - 1))

    def collect(self) -> Iterator[Any]:
        """The engine's figures of now, for the registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        m = self._engine.metrics()
        names, values = list(self._labels), list(self._labels.values())
        is_up = self._engine.is_alive
        up = GaugeMetricFamily("core_engine_up", "1 while the engine runs, 0 after it stopped", labels=names)
        up.add_metric(values, float(is_up))
        yield up
        for name, (attribute, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"core_{name}", text, labels=names)
            # What an engine held when it stopped is held no more.
            gauge.add_metric(values, float(getattr(m, attribute)) if is_up else 0.0)
            yield gauge
        usage = GaugeMetricFamily(
            "core_kv_cache_usage_ratio", "share of KV blocks that are used", labels=names
        )
        usage.add_metric(values, m.blocks_used / max(1, m.blocks_total) if is_up else 0.0)
        yield usage
        for name, (attribute, text) in _COUNTERS.items():
            count = CounterMetricFamily(f"core_{name}", text, labels=names)
            count.add_metric(values, float(getattr(m, attribute)))
            yield count
        ends = CounterMetricFamily(
            "core_request_finished", "sequences that ended, by reason", labels=[*names, "finished_reason"]
        )
        for reason, number in m.finished.items():
            ends.add_metric([*values, reason], float(number))
        yield ends

    def text(self) -> bytes:
        """What GET /metrics answers."""
        from prometheus_client import generate_latest

        found: bytes = generate_latest(self._registry)
        return found
