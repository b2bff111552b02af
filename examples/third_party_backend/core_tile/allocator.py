"""Caches and weights of backend `tile`.

A block's keys lie transposed, [K, H, Z], so that a tile of queries is multiplied with them as they are; its
values lie by head, [K, Z, Hv]. Outside, blocks have the contract's canonical form, [Z, K, H].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import OutOfMemoryError, UnsupportedError
from core.contract.spec import check_block_sizes, check_capabilities
from core.contract.types import BlockRegion, CacheLayerSpec, CachePlan, PackRequest, State
from core_tile.device import HostDevice
from core_tile.plugin import SPEC

Array = npt.NDArray[Any]


class Done:
    """A value that is there already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def is_ready(self) -> bool:
        """Always."""
        return True

    def get(self) -> Any:
        """The value."""
        return self._value


class Cache:
    """One layer's cache: keys [B, K, H, Z] and values [B, K, Z, Hv].

    Attributes:
        group: the cache group, whose tables say where a row's blocks lie.
    """

    def __init__(self, group: int, num_blocks: int, block_size: int, layer: CacheLayerSpec) -> None:
        K = layer.num_kv_heads
        self.group = group
        self.keys = np.zeros((num_blocks, K, layer.head_size, block_size), np.float32)
        self.values = np.zeros((num_blocks, K, block_size, layer.v_head_size), np.float32)

    @property
    def parts(self) -> tuple[Array, Array]:
        """Both arrays."""
        return self.keys, self.values

    def canonical(self) -> tuple[Array, Array]:
        """Views [B, Z, K, H] of them, which may be written to."""
        return self.keys.transpose(0, 3, 1, 2), self.values.transpose(0, 2, 1, 3)


class Allocator:
    """See `core.contract.interfaces.MemoryAllocator`."""

    def __init__(self, device: HostDevice, budget_bytes: int | None) -> None:
        self._device, self._budget, self._used = device, budget_bytes, 0

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """Bytes of one block."""
        if layer.kind not in ("paged", "window"):
            raise UnsupportedError(f"backend 'tile' has no {layer.kind} caches; choose another backend")
        if layer.dtype not in SPEC.dtypes:
            raise UnsupportedError(f"backend 'tile' has no caches of {layer.dtype}; it has {SPEC.dtypes}")
        return 4 * block_size * layer.num_kv_heads * (layer.head_size + layer.v_head_size)

    def allocate_state(self, plan: CachePlan) -> State:
        """A cache per layer."""
        check_block_sizes(SPEC, [group.block_size for group in plan.groups if group.kind != "state"])
        groups = [plan.groups[g] for g in plan.group_of]
        layers = list(zip(plan.layers, groups, strict=True))
        wanted = 4 * (plan.max_requests + 1)
        wanted += sum(group.num_blocks * self.block_bytes(layer, group.block_size) for layer, group in layers)
        self._reserve("the cache", wanted)
        caches = tuple(
            Cache(g, group.num_blocks, group.block_size, layer)
            for g, (layer, group) in zip(plan.group_of, layers, strict=True)
        )
        return State(caches, np.zeros(plan.max_requests + 1, np.int32))

    def free_state(self, state: State) -> None:
        """Give the caches back."""
        self._used -= state.last.nbytes + sum(part.nbytes for cache in state.caches for part in cache.parts)

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Done:
        """Copies of blocks."""
        ids = np.asarray(blocks, np.int64)
        return Done(tuple(np.ascontiguousarray(view[ids]) for view in state.caches[layer].canonical()))

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[Array, ...]
    ) -> State:
        """The inverse of `export_blocks`."""
        for view, values in zip(state.caches[layer].canonical(), data, strict=True):
            view[np.asarray(blocks, np.int64)] = values
        return state

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """Reads come before writes."""
        read, write = np.asarray(src, np.int64), np.asarray(dst, np.int64)
        for part in self._parts(state, group):
            part[write] = part[read].copy()
        return state

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """Set blocks to zero."""
        for part in self._parts(state, group):
            part[np.asarray(blocks, np.int64)] = 0
        return state

    def _parts(self, state: State, group: int) -> list[Array]:
        return [part for cache in state.caches if cache.group == group for part in cache.parts]

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """Write tokens into `last`."""
        state.last[np.asarray(slots, np.int64)] = np.asarray(tokens, np.int32)
        return state

    def pack(self, request: PackRequest) -> Array:
        """Bring a parameter to the device."""
        check_capabilities(SPEC, request)
        if request.dtype not in SPEC.dtypes:
            raise UnsupportedError(
                f"{request.name}: backend 'tile' has no {request.dtype}; it has {SPEC.dtypes}"
            )
        self._reserve(request.name, prod(request.array.shape) * 4)
        return np.array(request.array, np.float32)

    def unpack(self, packed: Array) -> Array:
        """The canonical array again."""
        return packed.copy()

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """None: blocks move in canonical form only."""
        return ()

    def used_bytes(self) -> int:
        """Memory held now."""
        return self._used

    def _reserve(self, what: str, wanted: int) -> None:
        free = self._device.memory().free_bytes if self._budget is None else self._budget - self._used
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)
        self._used += wanted
