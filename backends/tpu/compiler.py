"""A step function compiled once per bucket, and the sampling that follows it.

The step's int32 buffer is one traced argument, weights are a second one that is never donated, caches and
`last` are donated. Real counts are data: nothing in the trace depends on them, so a bucket compiles once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from backends.tpu.device import device_errors
from backends.tpu.sampler import TokensOnDevice, TokensOnHost, greedy, is_greedy
from core.contract.batch import Step, StepBatch
from core.contract.errors import DeviceError, UnsupportedError
from core.contract.interfaces import CompileRequest
from core.contract.types import Array, CacheHandle, SamplingBatch, State


class TpuOutput:
    """What a forward pass left on the device: `values` [R or T, V], and the step's int32 buffer."""

    def __init__(self, values: jax.Array, flat: jax.Array, batch: StepBatch) -> None:
        self.values, self.flat = values, flat
        per_sample = values.shape[0] == batch.bucket.requests and not batch.bucket.outputs.all_logits
        self._num_rows = batch.num_samples if per_sample else batch.num_tokens

    def get(self) -> npt.NDArray[np.float32]:
        """Wait; float32 [n, V], cut to the real rows on the host, where cutting compiles nothing."""
        with device_errors("the forward pass"):
            return np.array(self.values)[: self._num_rows].astype(np.float32, copy=False)

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Not declared.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"hidden state of layer {layer} was asked for, but backend 'tpu' does not declare "
            "batch.hidden_states; choose another backend"
        )


class TpuProgram:
    """One bucket's step.

    Attributes:
        compiles: how often the step was traced; 1 after `warm` or the first run, for ever.
    """

    def __init__(self, request: CompileRequest) -> None:
        self._request = request
        self._device: Any = request.device
        self.compiles = 0
        self._step = jax.jit(self._trace_step, donate_argnums=(2, 3))
        self._greedy = jax.jit(self._trace_greedy, donate_argnums=2)
        self._store = jax.jit(self._trace_store, donate_argnums=2)

    def _trace_step(
        self, weights: Any, flat: Array, caches: tuple[CacheHandle, ...], last: Array
    ) -> tuple[Array, tuple[CacheHandle, ...], Array]:
        self.compiles += 1  # runs while tracing only
        request = self._request
        step = Step.of(request.layout, request.plan, flat, last)
        values, caches = request.fn(request.ops, weights, caches, step)
        return values, tuple(caches), last

    def _trace_greedy(self, values: Array, flat: Array, last: Array) -> tuple[Array, Array]:
        if self._request.bucket.outputs.all_logits:
            values = values[self._request.layout.views(flat)["sample_rows"]]
        tokens = greedy(values)  # [R]
        return tokens, self._trace_store(tokens, flat, last)

    def _trace_store(self, tokens: Array, flat: Array, last: Array) -> Array:
        return last.at[self._request.layout.views(flat)["sample_slots"]].set(jnp.maximum(tokens, 0))

    def warm(self, state: State) -> State:
        """Compile by running a step of padding only, which writes to pad blocks and the pad slot."""
        layout = self._request.layout
        flat = np.zeros(layout.size, np.int32)
        layout.clear(flat)
        batch = StepBatch(0, layout, self._request.plan, flat, 0, 0, 0, 0)
        output, state = self.run(batch, state)
        with device_errors("warming up"):
            if output.values.ndim == 2:
                tokens, last = self._greedy(output.values, output.flat, state.last)
                state = state._replace(last=self._store(tokens, output.flat, last))
            jax.block_until_ready(state)  # type: ignore[no-untyped-call]
        return state

    def run(self, batch: StepBatch, state: State) -> tuple[TpuOutput, State]:
        """Async. Copies `batch.flat` before it returns."""
        if batch.layout != self._request.layout:
            raise DeviceError(
                f"a step of bucket {batch.bucket} was given to the program of bucket {self._request.bucket}; "
                "run it with its own program"
            )
        if batch.input_embeds is not None:
            raise UnsupportedError(
                "the step has input_embeds, but backend 'tpu' does not declare batch.input_embeds; "
                "give token ids"
            )
        with device_errors("the forward pass"):
            flat = self._device.put(batch.flat)
            values, caches, last = self._step(self._request.weights, flat, state.caches, state.last)
        return TpuOutput(values, flat, batch), state._replace(caches=caches, last=last)

    def sample(
        self, output: TpuOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[TokensOnDevice | TokensOnHost, State]:
        """Greedy batches stay on the device; for others the logits are waited for and drawn on the host."""
        if is_greedy(sampling):
            with device_errors("sampling"):
                tokens, last = self._greedy(output.values, output.flat, state.last)
            return TokensOnDevice(tokens, batch.num_samples), state._replace(last=last)
        logits = output.get()
        if batch.bucket.outputs.all_logits:
            logits = logits[batch.sample_rows[: batch.num_samples]]
        sampled = self._request.reference_sampler(logits, sampling)
        padded = np.zeros(batch.bucket.requests, np.int32)
        padded[: batch.num_samples] = sampled.tokens
        with device_errors("sampling"):
            last = self._store(self._device.put(padded), output.flat, state.last)
        return TokensOnHost(sampled), state._replace(last=last)

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[TokensOnDevice | TokensOnHost, State]:
        """`run`, then `sample`: both are submitted without waiting."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)
