"""EngineMetrics: what an engine tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """Figures of now and totals since the start.

    Attributes:
        num_running, num_waiting: sequences with and without a slot, now.
        steps, scheduled_tokens, preemptions: totals.
        cached_tokens: prompt tokens found in the prefix cache by sequences at their first start, in total.
        blocks_total, blocks_used, blocks_shared, blocks_cached: KV blocks, now; shared = held by several
            sequences, cached = kept for prompts to come.
        prefix_query_tokens, prefix_hit_tokens: tokens looked up in the prefix cache and found, in total; a
            sequence that starts again after a preemption counts again.
        prompt_tokens, generated_tokens: of requests queued, and accepted for output, in total.
        finished: sequences by the reason of their end ("stop", "length", "abort", "deadline", "error"), in
            total.
    """

    num_running: int = 0
    num_waiting: int = 0
    steps: int = 0
    scheduled_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_shared: int = 0
    blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
