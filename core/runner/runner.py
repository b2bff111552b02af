"""The runner of one rank: programs by bucket, and the device's state between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from core.block_manager import BlockCopy
from core.contract.batch import StepBatch, StepLayout
from core.contract.errors import DeviceError
from core.contract.interfaces import (
    CompileRequest,
    Device,
    DeviceTokens,
    MemoryAllocator,
    Program,
    Sampler,
    StepFunction,
)
from core.contract.ops import Ops
from core.contract.spec import BackendSpec
from core.contract.types import Bucket, CachePlan, Packed, SampledTokens, SamplingBatch
from core.sampling.reference import sample as reference_sample

Compile = Callable[[CompileRequest], Program]


class Runner:
    """Submits steps to one device in order and waits for them in order. Holds the only reference to its
    state.
    """

    def __init__(
        self,
        *,
        compile: Compile,
        device: Device,
        allocator: MemoryAllocator,
        ops: Ops,
        sampler: Sampler | None,
        fn: StepFunction,
        weights: tuple[Packed, ...],
        plan: CachePlan,
        spec: BackendSpec,
    ) -> None:
        self._compile = compile
        self._device = device
        self._allocator = allocator
        self._ops = ops
        self._sampler = sampler
        self._fn = fn
        self._weights = weights
        self._plan = plan
        self._spec = spec
        self._programs: dict[Bucket | None, Program] = {}
        self._is_serving = False
        self._pending: dict[int, DeviceTokens] = {}
        self._state = allocator.allocate_state(plan)

    def _program(self, layout: StepLayout) -> Program:
        key = None if self._spec.shapes.kind == "dynamic" else layout.bucket
        program = self._programs.get(key)
        if program is None:
            if self._is_serving and self._spec.shapes.kind == "static":
                raise DeviceError(
                    f"{layout.bucket} was not compiled before serving, and backend {self._spec.name!r} takes "
                    "no new shapes after that; this is a fault of the bucket ladder, please report it"
                )
            program = self._compile(
                CompileRequest(
                    device=self._device,
                    fn=self._fn,
                    ops=self._ops,
                    weights=self._weights,
                    state=self._state,
                    layout=layout,
                    plan=self._plan,
                    sampler=self._sampler,
                    reference_sampler=reference_sample,
                )
            )
            self._programs[key] = program
        return program

    def warm(self, buckets: Iterable[Bucket]) -> None:
        """Compile these buckets before serving."""
        for bucket in buckets:
            program = self._program(StepLayout.of(bucket, self._plan, self._spec.batch))
            self._state = program.warm(self._state)

    def submit(self, batch: StepBatch, sampling: SamplingBatch, copies: Sequence[BlockCopy]) -> None:
        """Queue a step on the device: block copies, forward pass, sampling."""
        for group in sorted({c.group for c in copies}):
            pairs = [(c.src, c.dst) for c in copies if c.group == group]
            self._state = self._allocator.copy_blocks(
                self._state, group, [src for src, _ in pairs], [dst for _, dst in pairs]
            )
        self._is_serving = True
        tokens, self._state = self._program(batch.layout).run_and_sample(batch, sampling, self._state)
        self._pending[batch.step_id] = tokens

    def wait(self, step_id: int) -> SampledTokens:
        """Tokens of a submitted step; int32 [num_samples].

        Raises:
            DeviceError: the step failed, or was never submitted.
        """
        tokens = self._pending.get(step_id)
        if tokens is None:
            raise DeviceError(f"step {step_id} was not submitted to this runner")
        # An interrupted wait may be tried again.
        found = tokens.get()
        del self._pending[step_id]
        return found

    def close(self) -> None:
        """Wait for what runs, and give the state back. The device stays open."""
        if self._pending:
            self._device.synchronize()
        self._pending.clear()
        self._programs.clear()
        self._allocator.free_state(self._state)
