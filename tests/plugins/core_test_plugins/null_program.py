"""Programs of the null backend: no step function is ever called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.batch import StepBatch
from core.contract.interfaces import CompileRequest, DeviceTokens, StepOutput
from core.contract.ops import Ops
from core.contract.types import Array, SampledTokens, SamplingBatch, State
from core_test_plugins.null_device import NullCache, NullDevice, Ready, StepRecord

PEAK = 100.0
"""The logit of the token that `null_token` names; all others are 0."""


class NullOps(Ops):
    """A table without any op of its own: nothing is computed."""


@dataclass(frozen=True)
class NullTokens:
    """Tokens of a step; `get` waits for it and for all before it."""

    device: NullDevice
    record: StepRecord
    sampled: SampledTokens

    def is_ready(self) -> bool:
        """See `core.contract.interfaces.DeviceTokens`."""
        return self.device.is_ready(self.record)

    def get(self) -> SampledTokens:
        """See `core.contract.interfaces.DeviceTokens`."""
        self.device.check_open()
        self.device.finish(self.record)
        return self.sampled


@dataclass(frozen=True)
class NullOutput:
    """Logits that make every sampler choose `null_token`."""

    device: NullDevice
    record: StepRecord

    def get(self) -> npt.NDArray[np.float32]:
        """float32 [n, V], of every real token where all logits were asked for."""
        self.device.finish(self.record)
        return self.logits(self.record.bucket.outputs.all_logits)

    def logits(self, of_all_tokens: bool) -> npt.NDArray[np.float32]:
        """float32 [n, V]."""
        record, v = self.record, self.record.views
        rows = np.arange(record.num_tokens) if of_all_tokens else v["sample_rows"][: record.num_samples]
        drawn = [self.device.token(p) for p in (v["positions"][rows] + 1).tolist()]
        out = np.zeros((len(drawn), self.device.vocab), np.float32)
        out[np.arange(len(drawn)), drawn] = PEAK
        return out

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """float32 [num_tokens, 1], zeros."""
        self.device.finish(self.record)
        return np.zeros((self.record.num_tokens, 1), np.float32)


class NullProgram:
    """See `core.contract.interfaces.Program`."""

    def __init__(self, request: CompileRequest) -> None:
        if not isinstance(request.device, NullDevice):
            raise TypeError(f"the null backend got a {type(request.device).__name__}, not its own device")
        self._request = request
        self._device = request.device

    def warm(self, state: State) -> State:
        """Nothing to do."""
        return State(*state)

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """See the protocol."""
        if not self._device.serves_any_shape and batch.layout != self._request.layout:
            self._device.violations.append(
                f"step {batch.step_id} of bucket {batch.bucket} was given to the program of "
                f"{self._request.bucket}"
            )
        shadows: list[npt.NDArray[np.int32] | None] = [None] * len(batch.plan.groups)
        for cache in state.caches:
            if isinstance(cache, NullCache):
                shadows[cache.group] = cache.shadow
        return NullOutput(self._device, self._device.submit(batch, shadows)), State(*state)

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol."""
        if not isinstance(output, NullOutput):
            raise TypeError(f"sample got a {type(output).__name__}, not what `run` returned")
        tokens = self._device.draw(output.record, sampling)
        n = batch.num_samples
        state.last[batch.sample_slots[:n]] = tokens
        sampled = SampledTokens(tokens.copy())
        if sampling.logprobs is not None:
            reported = self._request.reference_sampler(output.logits(False), sampling)
            sampled = replace(reported, tokens=sampled.tokens)
        return NullTokens(self._device, output.record, sampled), State(*state)

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """`run`, then `sample`."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)


class NullSampler:
    """See `core.contract.interfaces.Sampler`; programs of this backend need none."""

    def sample(self, logits: Array, sampling: SamplingBatch) -> Ready:
        """The largest logit of each row."""
        return Ready(SampledTokens(np.asarray(logits).argmax(-1).astype(np.int32)))


class NullCommunicator:
    """See `core.contract.interfaces.Communicator`: every member is taken to hold what this one holds."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, x: Array) -> Array:
        """The sum of equal values."""
        return x * self.world_size

    def all_gather(self, x: Array, dim: int) -> Array:
        """See the protocol."""
        return np.concatenate([x] * self.world_size, dim)

    def reduce_scatter(self, x: Array, dim: int) -> Array:
        """See the protocol."""
        return np.split(x * self.world_size, self.world_size, dim)[self.rank]

    def all_to_all(self, x: Array, send: Sequence[int], receive: Sequence[int]) -> Array:
        """As many rows as come in, of zeros."""
        return np.zeros((sum(receive), *np.shape(x)[1:]), np.asarray(x).dtype)

    def broadcast(self, x: Array, source: int) -> Array:
        """See the protocol."""
        return x

    def send(self, x: Array, to: int) -> None:
        """Goes nowhere."""

    def receive(self, like: Any, source: int) -> Array:
        """Zeros."""
        return np.zeros_like(like)

    def barrier(self) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Nothing to leave."""
