"""Programs: the step function itself, run at once. One program serves any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference.allocator import Done, supersede
from core.contract.batch import Step, StepBatch
from core.contract.errors import UnsupportedError
from core.contract.interfaces import CompileRequest, DeviceTokens, StepOutput
from core.contract.types import SamplingBatch, State


@dataclass(frozen=True)
class ReferenceOutput:
    """Logits of the real rows [n, V], in the precision that they were computed in."""

    logits: npt.NDArray[Any]

    def get(self) -> npt.NDArray[np.float32]:
        """See `core.contract.interfaces.StepOutput`."""
        return self.logits.astype(np.float32)

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Raises UnsupportedError: the spec does not declare `batch.hidden_states`."""
        raise UnsupportedError(
            f"the hidden state of layer {layer} was asked for, but backend 'cpu_reference' does not declare "
            "batch.hidden_states; return it from the step function instead"
        )


class ReferenceProgram:
    """See `core.contract.interfaces.Program`."""

    def __init__(self, request: CompileRequest) -> None:
        self._fn = request.fn
        self._ops = request.ops
        self._weights = request.weights
        self._plan = request.plan
        self._sampler = request.reference_sampler

    def warm(self, state: State) -> State:
        """Nothing to do."""
        return supersede(state)

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """See the protocol.

        Values that are not finite pass through without a warning: what they mean is the caller's affair.
        """
        if batch.input_embeds is not None:
            raise UnsupportedError(
                "the step has input_embeds, but backend 'cpu_reference' does not declare batch.input_embeds; "
                "give token ids"
            )
        state = supersede(state)
        step = Step.of(batch.layout, self._plan, batch.flat, state.last)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            logits, caches = self._fn(self._ops, self._weights, state.caches, step)
        per_token = batch.bucket.outputs.all_logits
        output = ReferenceOutput(logits[: batch.num_tokens if per_token else batch.num_samples])
        return output, state._replace(caches=tuple(caches))

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol. The sampler is the reference sampler."""
        n = batch.num_samples
        logits = output.get()
        if batch.bucket.outputs.all_logits:
            logits = logits[batch.sample_rows[:n]]
        sampled = self._sampler(logits, sampling)
        state = supersede(state)
        state.last[batch.sample_slots[:n]] = np.maximum(sampled.tokens, 0)
        return Done(sampled), state

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """`run`, then `sample`."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)
