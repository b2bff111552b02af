"""Runs a step function on any backend, through the hooks alone, as the engine does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.subject import Subject
from conformance.world import Row, World
from core.contract.batch import Step, StepLayout
from core.contract.errors import DeviceError
from core.contract.interfaces import CompileRequest, Program
from core.contract.ops import Ops
from core.contract.requests import AllocatorRequest, OpsRequest
from core.contract.types import Bucket, PackRequest, State
from core.sampling.reference import sample

Array = npt.NDArray[Any]
CaseFunction = Callable[[Ops, Mapping[str, Any], tuple[Any, ...], Step], tuple[Any, tuple[Any, ...]]]


@dataclass(frozen=True)
class Input:
    """A host array that a case gives to `pack`, the ops that read it, and its quantization."""

    array: Array
    uses: tuple[str, ...]
    scheme: str = ""


class Bench:
    """One backend with a case's weights and caches.

    Args:
        exact: give results in float64, bit for bit. Logits cross the waist in float32, so each float64 is
            sent as two float32; for the reference backend only, whose arrays are NumPy's.
        table: what is put in place of the backend's op table, given that.
    """

    def __init__(
        self,
        subject: Subject,
        dtype: str,
        world: World,
        inputs: Mapping[str, Input],
        fn: CaseFunction,
        *,
        exact: bool = False,
        table: Callable[[Ops], Ops] = lambda ops: ops,
    ) -> None:
        self.subject, self.dtype, self.world, self.exact = subject, dtype, world, exact
        self.rules = subject.spec.batch
        self.device = subject.device
        self.allocator = subject.handle.memory_allocator(AllocatorRequest(device=self.device))
        self.ops: Ops = table(subject.handle.ops(OpsRequest(device=self.device, dtype=dtype)))
        self.weights = tuple(
            self.allocator.pack(
                PackRequest(array=x.array, uses=x.uses, dtype=dtype, name=key, scheme=x.scheme)
            )
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
            self._programs[layout.bucket] = self.subject.handle.compile(request)
        return self._programs[layout.bucket]

    def step(self, rows: Sequence[Row], *, read: int | None = None) -> dict[tuple[int, int], Array]:
        """Run one step; result rows by (sequence, position)."""
        batch = self.world.batch(rows, self.rules, read=read)
        output, self.state = self.program(batch.layout).run(batch, self.state)
        values = output.get()
        if values.dtype != np.float32:
            raise DeviceError(f"a step's output is {values.dtype}, but float32 is wanted")
        if self.exact:
            values = np.ascontiguousarray(values).view(np.float64)
        where: npt.NDArray[Any]
        if not self.world.outputs.all_logits:
            where = batch.sample_rows[: batch.num_samples]
        else:
            where = np.arange(batch.num_tokens)
        owner = {
            row: r.sequence for row, r in enumerate(sorted(rows, key=lambda row: self.world.kind(row) == 2))
        }
        if len(values) != len(where):
            raise DeviceError(f"a step's output has {len(values)} rows, but {len(where)} are wanted")
        return {
            (owner[int(batch.row_of_token[t])], int(batch.positions[t])): value
            for t, value in zip(where, values, strict=True)
        }

    def run(self, steps: Sequence[Sequence[Row]]) -> Array:
        """Run steps that cover every token once; results in the order of token ids, [num_tokens, V]."""
        found: dict[tuple[int, int], Array] = {}
        for rows in self.world.legal(steps, self.rules):
            found |= self.step(rows)
        return np.stack([found[s, i] for s, n in enumerate(self.world.lengths) for i in range(n)])
