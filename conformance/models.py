"""Logits of a tiny model, or of the sample model, on any backend, teacher-forced, through the hooks alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
import numpy.typing as npt

from conformance.bench import Array, Bench, Input
from conformance.check import Missing
from conformance.families import write_folder
from conformance.subject import Subject
from conformance.world import Row, World
from core.contract.batch import StepBatch
from core.contract.errors import ConfigError
from core.contract.ops import Ops
from core.contract.spec import BatchRules
from core.contract.types import PackRequest
from core.env import cache_dir
from core.models import definition
from core.weights import open_checkpoint
from core.weights.dummy import dummy_checkpoint
from core.weights.loader import load_model
from core.weights.sample import NAME as SAMPLE
from core.weights.sample import resolve_model

SHORT = 15


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


@cache
def folder_of(family: str) -> Path:
    """The family's folder, written once per process."""
    return write_folder(family, Path(tempfile.mkdtemp(prefix="core-conformance-")) / family)


def sample() -> Path:
    """The file of the sample model, fetched where it is not there.

    Raises:
        Missing: it cannot be fetched.
    """
    try:
        return resolve_model(SAMPLE, cache_dir())
    except ConfigError as error:
        raise Missing(str(error)) from None


def model_logits(
    subject: Subject,
    model: str,
    ids: npt.NDArray[Any],
    dtype: str,
    seed: int,
    *,
    exact: bool = False,
    held: str = "",
    table: Callable[[Ops], Ops] = lambda ops: ops,
) -> Array:
    """Logits after every token of `ids` [T], then after each of its first `SHORT`, which are a sequence of
    their own: float64 [T + SHORT, V].

    `model`: a family, whose weights are drawn by `seed`, or "sample". Weights are rounded to `held` ("" = to
    `dtype`) first, so that the exact result is that of the weights which a backend of this dtype can hold.
    `exact` and `table`: as in `Bench`.
    """
    checkpoint = open_checkpoint(sample()) if model == SAMPLE else dummy_checkpoint(folder_of(model), seed)
    hf = checkpoint.config()
    found = definition(hf)
    config = found.adapt(found.config(hf), checkpoint.names())
    inputs: dict[str, Input] = {}

    def keep(request: PackRequest) -> None:
        array = request.array
        if "constant" not in request.uses:
            array = array.astype(np.dtype(held or dtype)).astype(np.float64)
        inputs[f"{len(inputs)} {request.name}"] = Input(array, request.uses)

    loaded = load_model(found, config, checkpoint, keep, dtype=dtype, max_length=max(256, len(ids)))

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        return loaded.fn(ops, tuple(weights.values()), caches, step)

    world = TokenWorld(
        lengths=(len(ids), SHORT),
        layers=found.cache_layers(loaded.config, dtype),
        ids=(*map(int, ids), *map(int, ids[:SHORT])),
    ).fitted(subject.spec)
    bench = Bench(subject, dtype, world, inputs, fn, exact=exact, table=table)
    return bench.run(world.mixed()).astype(np.float64)
