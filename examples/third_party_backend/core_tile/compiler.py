"""Programs of backend `tile`: one per bucket, which takes steps of its own bucket alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.batch import Step, StepBatch
from core.contract.errors import DeviceError, UnsupportedError
from core.contract.interfaces import CompileRequest
from core.contract.types import SamplingBatch, State
from core_tile.allocator import Done


@dataclass(frozen=True)
class Output:
    """Logits of the real rows."""

    logits: npt.NDArray[Any]

    def get(self) -> npt.NDArray[np.float32]:
        """As float32."""
        return self.logits.astype(np.float32)

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Not declared."""
        raise UnsupportedError(f"backend 'tile' gives no hidden states (of layer {layer}); choose another")


class TileProgram:
    """See `core.contract.interfaces.Program`."""

    def __init__(self, request: CompileRequest) -> None:
        self._request = request

    def warm(self, state: State) -> State:
        """Nothing is compiled by NumPy; a chip would do it here."""
        return state

    def run(self, batch: StepBatch, state: State) -> tuple[Output, State]:
        """The forward pass."""
        request = self._request
        if batch.bucket != request.layout.bucket:
            raise DeviceError(f"a program of {request.layout.bucket} got a step of {batch.bucket}")
        if batch.input_embeds is not None:
            raise UnsupportedError("backend 'tile' does not take input_embeds; give token ids")
        step = Step.of(batch.layout, request.plan, batch.flat.copy(), state.last)
        logits, caches = request.fn(request.ops, request.weights, state.caches, step)
        per_token = batch.bucket.outputs.all_logits
        real = batch.num_tokens if per_token else batch.num_samples
        return Output(logits[:real]), state._replace(caches=tuple(caches))

    def sample(
        self, output: Output, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[Done, State]:
        """By the reference sampler, on the host."""
        n = batch.num_samples
        logits = output.get()
        if batch.bucket.outputs.all_logits:
            logits = logits[batch.sample_rows[:n]]
        sampled = self._request.reference_sampler(logits, sampling)
        # A row that drew nothing has token -1; what follows it needs an id all the same.
        state.last[batch.sample_slots[:n]] = np.maximum(sampled.tokens, 0)
        return Done(sampled), state

    def run_and_sample(self, batch: StepBatch, sampling: SamplingBatch, state: State) -> tuple[Done, State]:
        """One after the other."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)
