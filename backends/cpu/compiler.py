"""Programs: the step function, run eagerly. Any shape is served by one program, and nothing is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backends.cpu.allocator import Done
from backends.cpu.arrays import to_numpy
from backends.cpu.sampler import CpuSampler
from core.contract.batch import Step, StepBatch
from core.contract.errors import UnsupportedError
from core.contract.interfaces import CompileRequest, DeviceTokens, StepOutput
from core.contract.types import SamplingBatch, State


@dataclass(frozen=True)
class CpuOutput:
    """What a step computed: array [rows, V or D], of which the first `num_rows` are real."""

    array: torch.Tensor
    num_rows: int

    def get(self) -> npt.NDArray[np.float32]:
        """See `core.contract.interfaces.StepOutput`."""
        return to_numpy(self.array[: self.num_rows].float())

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Raises UnsupportedError: the spec does not declare `batch.hidden_states`."""
        raise UnsupportedError(
            f"hidden states (of layer {layer}) are not declared by backend 'cpu'; use backend 'cpu_reference'"
        )


class CpuProgram:
    """See `core.contract.interfaces.Program`. Steps are finished when `run` returns."""

    def __init__(self, request: CompileRequest) -> None:
        self._request = request
        self._sampler = CpuSampler(request.reference_sampler)

    def warm(self, state: State) -> State:
        """Nothing to do."""
        return State(*state)

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """See the protocol. The batch's own layout is read, which may be of another bucket."""
        request = self._request
        if batch.input_embeds is not None:
            raise UnsupportedError(
                "the step has input_embeds, but backend 'cpu' does not declare batch.input_embeds; "
                "give token ids"
            )
        with torch.inference_mode():
            flat = torch.from_numpy(batch.flat)
            step = Step.of(batch.layout, request.plan, flat, state.last, host=batch)
            array, caches = request.fn(request.ops, request.weights, state.caches, step)
        return CpuOutput(array, _num_real(array, batch)), state._replace(caches=tuple(caches))

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol."""
        if not isinstance(output, CpuOutput):
            raise UnsupportedError(
                f"sample got a {type(output).__name__}; give it what this backend's `run` returned"
            )
        n = batch.num_samples
        with torch.inference_mode():
            logits = output.array
            if batch.bucket.outputs.all_logits:
                logits = logits[torch.from_numpy(batch.sample_rows[:n])]
            sampled = self._sampler.sample(logits[:n], sampling)
            slots = torch.from_numpy(batch.sample_slots[:n])
            state.last[slots] = torch.from_numpy(np.maximum(sampled.tokens, 0))
        return Done(sampled), State(*state)

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """`run`, then `sample`."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)


def _num_real(array: torch.Tensor, batch: StepBatch) -> int:
    """Real rows of a step's result: sampled rows, or all tokens (all logits, or an inner stage's hidden)."""
    per_token = batch.bucket.outputs.all_logits or array.shape[0] != batch.bucket.requests
    return batch.num_tokens if per_token else batch.num_samples
