"""Device, allocator and programs of the pretend backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.contract.batch import Int32, Step, StepBatch
from core.contract.errors import DeviceError, OutOfMemoryError, UnsupportedError
from core.contract.interfaces import CompileRequest, DeviceTokens, StepOutput
from core.contract.types import (
    BlockRegion,
    CacheLayerSpec,
    CachePlan,
    DeviceInfo,
    MemoryInfo,
    PackRequest,
    SampledTokens,
    SamplingBatch,
    State,
)
from core_test_plugins.null_device import Ready
from core_test_plugins.pretend.tensor import set_up, to_device, to_host

TOTAL_BYTES = 1 << 26


@dataclass(frozen=True)
class Cache:
    """One layer's cache: k [blocks, Z, K, H] and v [blocks, Z, K, Hv]."""

    group: int
    k: torch.Tensor
    v: torch.Tensor


class PretendDevice:
    """See `core.contract.interfaces.Device`."""

    def __init__(self) -> None:
        set_up()
        self.info = DeviceInfo(backend="pretend", index=0, name="pretend device", memory_bytes=TOTAL_BYTES)
        self.used_bytes = 0
        self._open = True

    def memory(self) -> MemoryInfo:
        """See the protocol."""
        free = TOTAL_BYTES - self.used_bytes
        return MemoryInfo(total_bytes=TOTAL_BYTES, free_bytes=free, kind="declared")

    def host_buffer(self, size: int) -> Int32:
        """See the protocol."""
        self.check_open()
        return np.zeros(size, np.int32)

    def synchronize(self) -> None:
        """See the protocol."""
        self.check_open()

    def close(self) -> None:
        """See the protocol."""
        self._open = False

    def check_open(self) -> None:
        """Raises DeviceError after `close`."""
        if not self._open:
            raise DeviceError("the pretend device is closed; open it again before using it")


class PretendAllocator:
    """See `core.contract.interfaces.MemoryAllocator`. Fresh blocks hold NaN, so that reading one shows."""

    def __init__(self, device: PretendDevice, budget_bytes: int | None) -> None:
        self._device = device
        self._budget = budget_bytes
        self._used = 0

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """See the protocol."""
        return layer.elements_per_token() * block_size * 4

    def allocate_state(self, plan: CachePlan) -> State:
        """See the protocol."""
        for layer in plan.layers:
            if layer.kind not in ("paged", "window") or layer.dtype != "float32":
                raise UnsupportedError(
                    f"a {layer.kind} cache of {layer.dtype} was asked of backend 'pretend', which has paged "
                    "and window caches of float32; choose another backend"
                )
        groups = [plan.groups[g] for g in plan.group_of]
        pairs = list(zip(plan.layers, groups, strict=True))
        self._reserve("the cache", sum(g.num_blocks * self.block_bytes(la, g.block_size) for la, g in pairs))
        caches = []
        for g, (layer, group) in zip(plan.group_of, pairs, strict=True):
            shape = (group.num_blocks, group.block_size, layer.num_kv_heads)
            k, v = (torch.full((*shape, n), math.nan) for n in (layer.head_size, layer.v_head_size))
            caches.append(Cache(g, to_device(k), to_device(v)))
        return State(tuple(caches), to_device(torch.zeros(plan.max_requests + 1, dtype=torch.int32)))

    def free_state(self, state: State) -> None:
        """See the protocol."""
        self._reserve("the cache", -sum(4 * (c.k.numel() + c.v.numel()) for c in state.caches))

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Ready:
        """See the protocol."""
        cache, ids = state.caches[layer], _index(blocks)
        return Ready(tuple(to_host(x.index_select(0, ids)).numpy() for x in (cache.k, cache.v)))

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[npt.NDArray[Any], ...]
    ) -> State:
        """See the protocol."""
        cache, ids = state.caches[layer], _index(blocks)
        for x, part in zip((cache.k, cache.v), data, strict=True):
            x.index_copy_(0, ids, to_device(torch.from_numpy(np.ascontiguousarray(part))))
        return State(*state)

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """See the protocol."""
        read, write = _index(src), _index(dst)
        for x in self._parts(state, group):
            x.index_copy_(0, write, x.index_select(0, read))
        return State(*state)

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """See the protocol."""
        for x in self._parts(state, group):
            x.index_fill_(0, _index(blocks), 0.0)
        return State(*state)

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """See the protocol."""
        values = to_device(torch.tensor(list(tokens), dtype=torch.int32))
        state.last.index_copy_(0, _index(slots), values)
        return State(*state)

    def pack(self, request: PackRequest) -> torch.Tensor:
        """See the protocol. Canonical layout, float32."""
        if request.scheme or request.dtype != "float32":
            raise UnsupportedError(
                f"{request.name} is wanted in {request.scheme or request.dtype}, which backend 'pretend' "
                "does not have; ask for float32"
            )
        self._reserve(request.name, math.prod(request.array.shape) * 4)
        return to_device(torch.from_numpy(np.asarray(request.array).astype(np.float32)))

    def unpack(self, packed: torch.Tensor) -> npt.NDArray[Any]:
        """See the protocol."""
        array: npt.NDArray[Any] = to_host(packed).numpy()
        return array

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """None: the device has no addresses."""
        return ()

    def used_bytes(self) -> int:
        """See the protocol."""
        return self._used

    def _parts(self, state: State, group: int) -> list[torch.Tensor]:
        return [x for c in state.caches if c.group == group for x in (c.k, c.v)]

    def _reserve(self, what: str, wanted: int) -> None:
        self._device.check_open()
        free = self._device.memory().free_bytes
        if self._budget is not None:
            free = min(free, self._budget - self._used)
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)
        self._used += wanted
        self._device.used_bytes += wanted


def _index(values: Sequence[int]) -> torch.Tensor:
    return to_device(torch.tensor(list(values), dtype=torch.int64))


@dataclass(frozen=True)
class PretendOutput:
    """Logits of a step on the device, of which the first `num_rows` are real."""

    array: torch.Tensor
    num_rows: int

    def get(self) -> npt.NDArray[np.float32]:
        """See `core.contract.interfaces.StepOutput`."""
        array: npt.NDArray[np.float32] = to_host(self.array[: self.num_rows]).numpy()
        return array

    def hidden(self, layer: int) -> npt.NDArray[np.float32]:
        """Raises UnsupportedError: not declared."""
        raise UnsupportedError("backend 'pretend' does not declare hidden states; use another")


class PretendProgram:
    """See `core.contract.interfaces.Program`. The step function runs eagerly and sees no host value."""

    def __init__(self, request: CompileRequest) -> None:
        self._request = request

    def warm(self, state: State) -> State:
        """Nothing to do."""
        return State(*state)

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """See the protocol."""
        request = self._request
        flat = to_device(torch.from_numpy(batch.flat))
        with torch.no_grad():
            step = Step.of(batch.layout, request.plan, flat, state.last)
            array, caches = request.fn(request.ops, request.weights, state.caches, step)
        num_rows = batch.num_tokens if batch.bucket.outputs.all_logits else batch.num_samples
        return PretendOutput(array, num_rows), state._replace(caches=tuple(caches))

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol: the reference sampler, on the host."""
        n = batch.num_samples
        logits = output.get()
        if batch.bucket.outputs.all_logits:
            logits = logits[batch.sample_rows[:n]]
        sampled: SampledTokens = self._request.reference_sampler(logits, sampling)
        slots = to_device(torch.from_numpy(batch.sample_slots[:n].astype(np.int64)))
        ids = np.maximum(np.asarray(sampled.tokens, np.int32), 0)
        state.last.index_copy_(0, slots, to_device(torch.from_numpy(ids)))
        return Ready(sampled), State(*state)

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """`run`, then `sample`."""
        output, state = self.run(batch, state)
        return self.sample(output, batch, sampling, state)
