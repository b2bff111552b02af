"""One case per behaviour of an op: inputs, a step function that calls the op, and the exact result.

A step function runs on any backend. Its activations are columns of the table "x", embedded by token id, so
they are slices of a wider array, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
import numpy.typing as npt

from conformance.bench import CaseFunction, Input
from conformance.dense import Bounded
from conformance.tolerance import Precision
from conformance.world import World
from core.contract.batch import Step
from core.contract.ops import Ops
from core.contract.spec import BackendSpec

Array = npt.NDArray[Any]

EPS = 1e-5


@dataclass(frozen=True, repr=False)
class Case:
    """An op under one choice of its options.

    Attributes:
        op: the op's name. name: unique.
        exact: result [num_tokens, V] in float64 and its bound, for a precision.
        schedules: names of the World's schedules under which the result is the same.
        supported: whether a backend declares what the case needs.
        composite: for a fused op, the same step by the op's composite.
    """

    op: str
    name: str
    world: World
    inputs: Mapping[str, Input]
    fn: CaseFunction
    exact: Callable[[Precision], Bounded]
    schedules: tuple[str, ...] = ("whole",)
    supported: Callable[[BackendSpec], bool] = lambda spec: True
    composite: CaseFunction | None = None


def exactly(x: Array) -> Array:
    """Rounded to what the dtype under test holds exactly, in float64: nobody is charged for it."""
    return x.astype(np.dtype(_Run.dtype)).astype(np.float64)


class _Run:
    """What a worker's one run fixes for all cases."""

    seed = 0
    dtype = "float32"


def set_run(seed: int, dtype: str) -> None:
    """Seed of everything that `Draw` gives from now on, and the dtype that holds it exactly."""
    _Run.seed, _Run.dtype = seed, dtype


class Draw:
    """Random inputs that the dtype under test holds exactly."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([_Run.seed, seed])

    def __call__(self, *shape: int, scale: float = 1.0) -> Array:
        return exactly(scale * self._rng.normal(size=shape))

    def weight(self, out: int, into: int) -> Array:
        """A matrix that keeps the size of what it multiplies."""
        return self(out, into, scale=into**-0.5)

    def norm(self, size: int) -> Array:
        """A norm's weight, around 1."""
        return exactly(1 + self(size, scale=0.2))


def rotary(length: int, size: int) -> Array:
    """A rotary table that float32 holds exactly: [length, size], cosines then sines."""
    angles = np.arange(length)[:, None] * 100.0 ** -(np.arange(0, size, 2) / size)
    return _single(np.concatenate([np.cos(angles), np.sin(angles)], -1))


def _single(x: Array) -> Array:
    return x.astype(np.float32).astype(np.float64)


def table(*columns: Array) -> tuple[Input, list[slice]]:
    """Activations [num_tokens, ...] side by side, each flattened, and the columns where they lie."""
    flat = [x.reshape(len(x), -1) for x in columns]
    ends = np.cumsum([x.shape[1] for x in flat]).tolist()
    slices = [slice(end - x.shape[1], end) for end, x in zip(ends, flat, strict=True)]
    return Input(np.concatenate(flat, 1), ("embed",)), slices


def activations(ops: Ops, w: Mapping[str, Any], step: Step, slices: list[slice]) -> list[Any]:
    """The columns of "x" of the step's tokens, each [T, width]."""
    x = ops.embed(w["x"], ops.select_tokens(step))
    return [x[:, s] for s in slices]


def per_sequence(world: World, f: Callable[[slice], Bounded]) -> Bounded:
    """Results of whole sequences, given the tokens of each, laid end to end as [num_tokens, V]."""
    parts = []
    for s, n in enumerate(world.lengths):
        first = world.first_id(s)
        y = f(slice(first, first + n))
        parts.append(y.reshape(n, -1))
    return Bounded(np.concatenate([y.value for y in parts]), np.concatenate([y.error for y in parts]))


def positions(world: World) -> Array:
    """[num_tokens]"""
    return np.concatenate([np.arange(n) for n in world.lengths])


def product_use(array: Array) -> Input:
    """A matrix that `linear` reads."""
    return Input(array, ("linear",))


def norm_use(array: Array) -> Input:
    """A norm's weight."""
    return Input(array, ("norm",))


def bias_use(array: Array) -> Input:
    """A bias."""
    return Input(array, ("bias",))


def constant_use(array: Array) -> Input:
    """A rotary table, say."""
    return Input(array, ("constant",))
