"""Runs a step function on any backend, through the hooks alone, as the engine does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import backends
from core.contract.batch import Step, StepLayout
from core.contract.interfaces import CompileRequest, Program
from core.contract.ops import Ops
from core.contract.requests import AllocatorRequest, DeviceRequest, OpsRequest, SpecRequest
from core.contract.spec import BackendSpec
from core.contract.types import Bucket, PackRequest, State
from core.sampling.reference import sample
from tests.backends.steps import Row, World

REFERENCE = "cpu_reference"
BACKENDS = sorted({p.parent.name for root in backends.__path__ for p in Path(root).glob("*/plugin.py")})

Array = npt.NDArray[Any]
CaseFunction = Callable[[Ops, Mapping[str, Any], tuple[Any, ...], Step], tuple[Any, tuple[Any, ...]]]


@cache
def plugin(name: str) -> Any:
    """A backend's entry module."""
    return importlib.import_module(f"backends.{name}.plugin")


@cache
def spec_of(name: str) -> BackendSpec:
    """What a backend declares."""
    spec: BackendSpec = plugin(name).core_backend_spec(SpecRequest(contract=(0, 1)))
    return spec


@cache
def device_of(name: str) -> Any:
    """A backend's first device, opened once."""
    options = {"platform": "cpu"} if spec_of(name).framework == "jax" else {}
    return plugin(name).core_open_device(DeviceRequest(options=options))


@dataclass(frozen=True)
class Input:
    """A host array that a case gives to `pack`, and the ops that read it."""

    array: Array
    uses: tuple[str, ...]


class Bench:
    """One backend with a case's weights and caches.

    Args:
        exact: give results in float64, bit for bit. Logits cross the waist in float32, so each float64 is
            sent as two float32; for the reference backend only, whose arrays are NumPy's.
    """

    def __init__(
        self,
        name: str,
        dtype: str,
        world: World,
        inputs: Mapping[str, Input],
        fn: CaseFunction,
        *,
        exact: bool = False,
    ) -> None:
        self.name, self.dtype, self.world, self.exact = name, dtype, world, exact
        self.rules = spec_of(name).batch
        self.device = device_of(name)
        self.allocator = plugin(name).core_memory_allocator(AllocatorRequest(device=self.device))
        self.ops: Ops = plugin(name).core_ops(OpsRequest(device=self.device, dtype=dtype))
        self.weights = tuple(
            self.allocator.pack(PackRequest(array=x.array, uses=x.uses, dtype=dtype, name=key))
            for key, x in inputs.items()
        )
        keys = tuple(inputs)

        def step_function(ops: Ops, weights: Any, caches: Any, step: Step) -> Any:
            out, caches = fn(ops, dict(zip(keys, weights, strict=True)), caches, step)
            if exact:
                out = np.ascontiguousarray(out, np.float64).view(np.float32)
            return out, caches

        self._fn = step_function
        self._programs: dict[Bucket, Program] = {}
        self.state: State = self.allocator.allocate_state(world.plan)

    def program(self, layout: StepLayout) -> Program:
        """The program of a bucket."""
        if layout.bucket not in self._programs:
            request = CompileRequest(
                device=self.device,
                fn=self._fn,
                ops=self.ops,
                weights=self.weights,
                state=self.state,
                layout=layout,
                plan=self.world.plan,
                sampler=None,
                reference_sampler=sample,
            )
            self._programs[layout.bucket] = plugin(self.name).core_compile(request)
        return self._programs[layout.bucket]

    def step(self, rows: Sequence[Row], *, read: int | None = None) -> dict[tuple[int, int], Array]:
        """Run one step; result rows by (sequence, position)."""
        batch = self.world.batch(rows, self.rules, read=read)
        output, self.state = self.program(batch.layout).run(batch, self.state)
        values = output.get()
        assert values.dtype == np.float32
        if self.exact:
            values = np.ascontiguousarray(values).view(np.float64)
        if not self.world.outputs.all_logits:
            where = batch.sample_rows[: batch.num_samples]
        else:
            where = np.arange(batch.num_tokens)
        owner = {row: r.sequence for row, r in enumerate(sorted(rows, key=lambda row: row.kind == 2))}
        assert len(values) == len(where)
        return {
            (owner[int(batch.row_of_token[t])], int(batch.positions[t])): value
            for t, value in zip(where, values, strict=True)
        }

    def run(self, steps: Sequence[Sequence[Row]]) -> Array:
        """Run steps that cover every token once; results in the order of token ids, [num_tokens, V]."""
        found: dict[tuple[int, int], Array] = {}
        for rows in steps:
            found |= self.step(rows)
        return np.stack([found[s, i] for s, n in enumerate(self.world.lengths) for i in range(n)])
