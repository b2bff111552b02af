"""Logits of a model on any backend, through the hooks alone: its weights loaded as the engine loads them, its
step function compiled, its caches scattered over a pool.

The prompt comes in three chunks, two of which end within a block; then one decode step per token. A second
sequence, a beginning of the first, joins late, so that steps are mixed and rows change places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.world import Row, World
from core.contract.batch import Step, StepBatch
from core.contract.ops import Ops
from core.contract.spec import BatchRules
from core.contract.types import PackRequest
from core.models import definition
from core.parallel.sharding import Shard
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import load_model
from tests.backends.harness import Bench, Input

Float64 = npt.NDArray[np.float64]

CHUNKS = (32, 19, 16)
LATE, SHORT = 11, 15  # the second sequence's prompt and length


@dataclass(frozen=True)
class TokenWorld(World):
    """A world whose sequences hold these token ids, one after the other."""

    ids: tuple[int, ...] = ()

    def batch(
        self, rows: Sequence[Row], rules: BatchRules, *, step_id: int = 0, read: int | None = None
    ) -> StepBatch:
        """As `World.batch`, with `ids` in place of the running numbers."""
        batch = super().batch(rows, rules, step_id=step_id, read=read)
        token_ids = batch.layout.views(batch.flat)["token_ids"][: batch.num_tokens]
        token_ids[:] = np.asarray(self.ids, np.int32)[token_ids]
        return batch


def script(length: int) -> list[list[Row]]:
    """Steps of the first sequence, `length` tokens, and of the second, which joins in the third step."""
    ends = np.cumsum(CHUNKS)
    first = [Row(0, int(end) - count, count) for count, end in zip(CHUNKS, ends, strict=True)]
    first += [Row(0, i, 1) for i in range(int(ends[-1]), length)]
    second = [Row(1, 0, LATE), *(Row(1, i, 1) for i in range(LATE, SHORT))]
    steps = [[row] for row in first]
    for step, row in zip(steps[len(CHUNKS) - 1 :], second, strict=False):
        step.append(row)
    return steps


def bench_of(
    folder: Path,
    ids: npt.NDArray[Any],
    backend: str,
    dtype: str,
    *,
    shard: Shard | None = None,
    table: Callable[[Ops], Ops] = lambda ops: ops,
) -> Bench:
    """A backend with the model in `folder` loaded, or a rank's share of it; `table` wraps the op table."""
    checkpoint = open_checkpoint(folder)
    hf = checkpoint.config()
    model = definition(hf)
    config = model.adapt(model.config(hf), checkpoint.names())
    inputs: dict[str, Input] = {}

    def keep(request: PackRequest) -> None:
        inputs[f"{len(inputs)} {request.name}"] = Input(request.array, request.uses)

    loaded = load_model(model, config, checkpoint, keep, dtype=dtype, max_length=128, shard=shard)
    checkpoint.close()

    def fn(ops: Ops, weights: Mapping[str, Any], caches: tuple[Any, ...], step: Step) -> Any:
        return loaded.fn(table(ops), tuple(weights.values()), caches, step)

    world = TokenWorld(
        lengths=(len(ids), SHORT),
        layers=model.cache_layers(loaded.config, dtype),
        ids=(*map(int, ids), *map(int, ids[:SHORT])),
    )
    return Bench(backend, dtype, world, inputs, fn, exact=dtype == "float64")


def model_logits(folder: Path, ids: npt.NDArray[Any], backend: str, dtype: str) -> Float64:
    """Logits after every token of `ids` [T], then after each of its first `SHORT`: float64 [T + SHORT, V].

    Bit for bit what the backend computed, also in float64.
    """
    return bench_of(folder, ids, backend, dtype).run(script(len(ids))).astype(np.float64)
