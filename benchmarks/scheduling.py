"""Scheduling plus batch building of one decode step, without `update`, under the null backend's rules.

256 requests decode; 0 or 10,000 more wait. Prints, and with --out writes, the median of 1,000 steps in
microseconds.

    python benchmarks/scheduling.py --out benchmarks/results/scheduling.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from core.block_manager import BlockManager
from core.contract.types import CacheGroupSpec, CacheLayerSpec, CachePlan
from core.engine.memory import block_groups
from core.plugins import Plugins
from core.runner.buckets import Buckets
from core.runner.builder import BatchBuilder
from core.sampling.params import SamplingParams
from core.scheduler import Request, Scheduler, SchedulerConfig

RUNNING, MAX_LEN, BLOCK, WARM, STEPS = 256, 4096, 16, 300, 1000
BUDGET = 8192


def make(waiting: int) -> tuple[Scheduler, BatchBuilder]:
    """A scheduler with all its requests added, prompts of 32 to 511 tokens, and its builder."""
    plugins = Plugins()
    plugins.load()
    spec = plugins.backend("null").spec
    layer = CacheLayerSpec(kind="paged", dtype="float32", num_kv_heads=8, head_size=128, v_head_size=128)
    group = CacheGroupSpec(
        kind="paged", layers=(0,), block_size=BLOCK, num_blocks=1 + RUNNING * MAX_LEN // BLOCK
    )
    plan = CachePlan(layers=(layer,), groups=(group,), group_of=(0,), max_requests=RUNNING)
    blocks = BlockManager(block_groups(plan), max_requests=RUNNING, max_model_len=MAX_LEN)
    config = SchedulerConfig(max_requests=RUNNING, max_model_len=MAX_LEN, max_batch_tokens=BUDGET)
    scheduler = Scheduler(config, spec.batch, blocks)
    buffers = [np.zeros(2_000_000, np.int32) for _ in range(2)]
    builder = BatchBuilder(
        plan,
        spec.batch,
        Buckets(spec, plan, BUDGET, MAX_LEN),
        scheduler.table,
        blocks,
        buffers,
        vocab_size=1000,
    )
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=MAX_LEN - 600)
    for i in range(RUNNING + waiting):
        prompt = tuple(rng.integers(1, 1000, int(rng.integers(32, 512))).tolist())
        scheduler.add(Request(request_id=str(i), prompt_ids=prompt, params=params))
    return scheduler, builder


def decode_steps(scheduler: Scheduler, builder: BatchBuilder) -> Iterator[float]:
    """Seconds of `schedule` and `build`, for each step in which all requests decode."""
    while True:
        start = time.perf_counter()
        plan = scheduler.schedule()
        if plan is None:
            return
        batch, _ = builder.build(plan), builder.sampling(plan)
        seconds = time.perf_counter() - start
        if batch.num_decodes == RUNNING and not plan.prefills:
            yield seconds
        scheduler.update(plan.step_id, np.full(batch.num_samples, 5, np.int32))


def measure(waiting: int) -> dict[str, float]:
    """Median and 99th percentile in microseconds."""
    steps = decode_steps(*make(waiting))
    for _ in range(WARM):
        next(steps)
    times = sorted(next(steps) * 1e6 for _ in range(STEPS))
    return {"median_us": round(statistics.median(times), 1), "p99_us": round(times[int(0.99 * STEPS)], 1)}


def main() -> None:
    """Measure both cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_args().out
    quiet, loaded = measure(0), measure(10_000)
    result = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "decoding": RUNNING,
        "steps": STEPS,
        "none_waiting": quiet,
        "10000_waiting": loaded,
        "ratio": round(loaded["median_us"] / quiet["median_us"], 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
