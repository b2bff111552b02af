"""The runner of one rank: programs by bucket, and the device's state between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np

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
    StepOutput,
)
from core.contract.ops import Ops
from core.contract.spec import BackendSpec
from core.contract.types import Bucket, CachePlan, Packed, SampledTokens, SamplingBatch
from core.sampling.reference import logprobs_of
from core.sampling.reference import sample as reference_sample
from core.scheduler.plan import PromptRow

Compile = Callable[[CompileRequest], Program]


@dataclass
class _Pending:
    """A submitted step: what it computes, and its tokens once sampling was submitted, too.

    `output` is let go of once nobody needs it: logits are large.
    """

    batch: StepBatch
    output: StepOutput | None
    tokens: DeviceTokens | None
    prompts: tuple[PromptRow, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step gave: tokens of the sampled rows, and log-probabilities of its prompt rows' targets."""

    sampled: SampledTokens
    prompts: tuple[SampledTokens, ...] = ()


def _prompts(output: StepOutput, rows: tuple[PromptRow, ...]) -> tuple[SampledTokens, ...]:
    logits = output.get()
    found = []
    for row in rows:
        count = len(row.targets)
        wanted = np.full(count, row.top, np.int32)
        found.append(logprobs_of(row.targets, logits[row.first : row.first + count], wanted))
    return tuple(found)


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
        self._pending: dict[int, _Pending] = {}
        self._state = allocator.allocate_state(plan)
        self._is_state_lost = False

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

    def submit(
        self,
        batch: StepBatch,
        sampling: SamplingBatch | None,
        copies: Sequence[BlockCopy],
        prompts: Sequence[PromptRow] = (),
    ) -> None:
        """Queue a step on the device: block copies, forward pass, sampling.

        Without `sampling`, `sample` follows later, and before the next step.
        """
        with self._passing_state():
            for group in sorted({c.group for c in copies}):
                pairs = [(c.src, c.dst) for c in copies if c.group == group]
                self._state = self._allocator.copy_blocks(
                    self._state, group, [src for src, _ in pairs], [dst for _, dst in pairs]
                )
            self._is_serving = True
            program = self._program(batch.layout)
            if prompts or sampling is None:
                output, self._state = program.run(batch, self._state)
                self._pending[batch.step_id] = _Pending(batch, output, None, tuple(prompts))
                if sampling is not None:
                    self.sample(batch.step_id, sampling)
            else:
                tokens, self._state = program.run_and_sample(batch, sampling, self._state)
                self._pending[batch.step_id] = _Pending(batch, None, tokens, ())

    @contextmanager
    def _passing_state(self) -> Iterator[None]:
        """A call that fails or is interrupted may have used the state up without giving the next one."""
        try:
            yield
        except BaseException:
            self._is_state_lost = True
            raise

    def sample(self, step_id: int, sampling: SamplingBatch) -> None:
        """Queue the sampling of a step that was submitted without it.

        Raises:
            DeviceError: it failed, or there is no such step.
        """
        pending = self._pending.get(step_id)
        if pending is None or pending.output is None or pending.tokens is not None:
            raise DeviceError(f"step {step_id} does not wait for its sampling")
        program = self._program(pending.batch.layout)
        with self._passing_state():
            pending.tokens, self._state = program.sample(pending.output, pending.batch, sampling, self._state)
        if not pending.prompts:
            pending.output = None

    def wait(self, step_id: int) -> StepResult:
        """What a submitted step gave.

        Raises:
            DeviceError: the step failed, or was never submitted.
        """
        pending = self._pending.get(step_id)
        if pending is None or pending.tokens is None:
            lacks = "submitted to this runner" if pending is None else "sampled"
            raise DeviceError(f"step {step_id} was not {lacks}")
        # An interrupted wait may be tried again.
        output = pending.output
        found = StepResult(pending.tokens.get(), () if output is None else _prompts(output, pending.prompts))
        del self._pending[step_id]
        return found

    def close(self) -> None:
        """Wait for what runs, and give the state back. The device stays open."""
        if self._pending:
            self._device.synchronize()
        self._pending.clear()
        self._programs.clear()
        with suppress(DeviceError) if self._is_state_lost else nullcontext():
            self._allocator.free_state(self._state)
