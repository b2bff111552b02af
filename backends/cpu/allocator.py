"""Caches, state slots and weights in host memory.

Layouts: paged and window layers hold k [B, Z, K, H] and v [B, Z, K, Hv]; latent layers [B, Z, C + P]; state
layers one [slots, *shape] per part. Weights stay in canonical layout. So canonical export is a copy.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backends.cpu.arrays import index, to_numpy, to_torch, torch_dtype
from backends.cpu.device import CpuDevice
from backends.cpu.packed import SCHEMES, PackedWeight, Weight
from backends.cpu.plugin import SPEC
from core.contract.errors import DeviceError, OutOfMemoryError, UnsupportedError
from core.contract.spec import check_block_sizes
from core.contract.types import BlockRegion, CacheLayerSpec, CachePlan, PackRequest, State

WIDE_USES = frozenset({"norm", "bias", "constant"})
"""Parameters with one of these uses are kept in float32 whatever the compute dtype: they are small."""


@dataclass(eq=False)
class Cache:
    """One layer's cache. `parts`: name -> tensor [blocks or slots, ...]: k and v; latent; or the state's
    parts.
    """

    group: int
    layer: CacheLayerSpec
    parts: dict[str, torch.Tensor]

    def flat(self, name: str) -> torch.Tensor:
        """A part with one row per token slot: [B * Z, ...]."""
        return self.parts[name].flatten(0, 1)

    def num_bytes(self) -> int:
        """Memory held."""
        return sum(x.nbytes for x in self.parts.values())


@dataclass(frozen=True)
class Done:
    """A Pending that is ready from the start."""

    value: Any

    def is_ready(self) -> bool:
        """Always."""
        return True

    def get(self) -> Any:
        """The value."""
        return self.value


def part_shapes(layer: CacheLayerSpec, block_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of one block (or slot) and dtype of each part, in the order of the canonical form."""
    Z = block_size
    if layer.kind == "state":
        return {part.name: (part.shape, part.dtype) for part in layer.state}
    if layer.kind == "latent":
        return {"latent": ((Z, layer.latent_size + layer.rope_size), layer.dtype)}
    if layer.kind in ("paged", "window"):
        K = layer.num_kv_heads
        return {
            "k": ((Z, K, layer.head_size), layer.dtype),
            "v": ((Z, K, layer.v_head_size), layer.dtype),
        }
    raise UnsupportedError(
        f"a cache layer of kind {layer.kind!r} was asked of backend 'cpu', which has paged, window, latent "
        "and state; choose another backend"
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system gives when they are first written, so a large cache costs no time.

    NumPy asks the system for zeroed memory; torch would write the zeros itself.
    """
    flat = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(flat).view(dtype).reshape(shape)


class CpuAllocator:
    """See `core.contract.interfaces.MemoryAllocator`. `budget_bytes` None: what the host has available."""

    def __init__(self, device: CpuDevice, budget_bytes: int | None) -> None:
        self._device = device
        self._budget = budget_bytes
        self._used = 0

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """See the protocol."""
        return sum(
            math.prod(shape) * torch_dtype(dtype, f"cache part {name!r}").itemsize
            for name, (shape, dtype) in part_shapes(layer, block_size).items()
        )

    def allocate_state(self, plan: CachePlan) -> State:
        """See the protocol. Blocks start as zeros."""
        self._device.check_open()
        check_block_sizes(SPEC, [group.block_size for group in plan.groups if group.kind != "state"])
        groups = [plan.groups[g] for g in plan.group_of]
        wanted = 4 * (plan.max_requests + 1)
        for layer, group in zip(plan.layers, groups, strict=True):
            wanted += group.num_blocks * self.block_bytes(layer, group.block_size)
        self._reserve("the cache", wanted)
        try:
            caches = []
            for layer, g in zip(plan.layers, plan.group_of, strict=True):
                group = plan.groups[g]
                parts = {
                    name: _zeros((group.num_blocks, *shape), torch_dtype(dtype, name))
                    for name, (shape, dtype) in part_shapes(layer, group.block_size).items()
                }
                caches.append(Cache(g, layer, parts))
            last = torch.zeros(plan.max_requests + 1, dtype=torch.int32)
        except (RuntimeError, MemoryError) as error:  # torch's allocator has no type of its own
            self._used -= wanted
            raise OutOfMemoryError("the cache", wanted, self._free()) from error
        return State(tuple(caches), last)

    def free_state(self, state: State) -> None:
        """See the protocol. The handles are emptied, so later use is an error and not a read of old data."""
        if not state.last.numel():
            raise DeviceError("this State was freed before; allocate a new one")
        self._used -= sum(cache.num_bytes() for cache in state.caches) + state.last.nbytes
        for cache in state.caches:
            cache.parts = {}
        state.last.resize_(0)

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Done:
        """See the protocol."""
        ids = index(blocks)
        return Done(tuple(to_numpy(x[ids]) for x in state.caches[layer].parts.values()))

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[npt.NDArray[Any], ...]
    ) -> State:
        """See the protocol."""
        ids = index(blocks)
        for x, part in zip(state.caches[layer].parts.values(), data, strict=True):
            x[ids] = to_torch(part, x.dtype)
        return State(*state)

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """See the protocol."""
        read, write = index(src), index(dst)
        for x in self._parts(state, group):
            x[write] = x[read]  # indexing copies, so all reads come first
        return State(*state)

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """See the protocol."""
        ids = index(blocks)
        for x in self._parts(state, group):
            x[ids] = 0
        return State(*state)

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """See the protocol."""
        state.last[index(slots)] = torch.as_tensor(list(tokens), dtype=torch.int32)
        return State(*state)

    def pack(self, request: PackRequest) -> Weight:
        """See the protocol. The layout is the canonical one; norms, biases and constants are float32.

        Quantized weights keep their bits.
        """
        self._device.check_open()
        if request.scheme and request.scheme not in SCHEMES:
            raise UnsupportedError(
                f"{request.name} is quantized with {request.scheme!r}; backend 'cpu' keeps "
                f"{', '.join(SCHEMES)}: pass it decoded, as a plain dtype"
            )
        dtype = torch_dtype(request.dtype, request.name)
        if WIDE_USES.intersection(request.uses):
            dtype = torch.float32
        size = 1 if request.scheme else dtype.itemsize
        wanted = math.prod(request.array.shape) * size
        self._reserve(request.name, wanted)
        packed: Weight
        try:
            if request.scheme:
                packed = PackedWeight.of(request.array, request.scheme)
            else:
                packed = to_torch(request.array, dtype)
        except (RuntimeError, MemoryError) as error:
            self._used -= wanted
            raise OutOfMemoryError(request.name, wanted, self._free()) from error
        weakref.finalize(packed, self._release, wanted).atexit = False
        return packed

    def unpack(self, packed: Weight) -> npt.NDArray[Any]:
        """See the protocol."""
        return packed.blocks() if isinstance(packed, PackedWeight) else to_numpy(packed)

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """See the protocol: one region per part, in the order of the canonical form."""
        cache = state.caches[layer]
        return tuple(
            BlockRegion(
                x[block].data_ptr(), x[block].nbytes, f"canonical/{name}/{tuple(x.shape[1:])}/{x.dtype}"
            )
            for name, x in cache.parts.items()
        )

    def used_bytes(self) -> int:
        """See the protocol. A packed weight counts until nothing refers to it."""
        return self._used

    def _parts(self, state: State, group: int) -> list[torch.Tensor]:
        return [x for cache in state.caches if cache.group == group for x in cache.parts.values()]

    def _free(self) -> int:
        if self._budget is None:
            return self._device.memory().free_bytes
        return max(0, self._budget - self._used)

    def _reserve(self, what: str, wanted: int) -> None:
        free = self._free()
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)
        self._used += wanted

    def _release(self, num_bytes: int) -> None:
        self._used -= num_bytes
