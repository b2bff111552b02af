"""Caches, state slots and weights, in canonical layout; and the rule that a State is used once.

A block holds NaN until something is written to it, so whatever reads an entry that was never written shows.
A handle gives its arrays to its successor and is empty from then on: using an old State is an error here,
as it is on hardware that reuses the memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference.device import ReferenceDevice
from backends.cpu_reference.rows import real_tokens
from core.contract.batch import Step
from core.contract.errors import DeviceError, OutOfMemoryError, UnsupportedError
from core.contract.spec import check_block_sizes
from core.contract.types import BlockRegion, CacheLayerSpec, CachePlan, PackRequest, State

Array = npt.NDArray[Any]

DTYPES = ("float64", "float32")
USED_UP = np.iinfo(np.int32).min
"""What `last` of a State holds after the State was used; no token has this id."""

_STALE = "this State (or one of its cache handles) was used before; keep the one that the last call returned"


class Cache:
    """One layer's cache. Paged and window layers have the parts k [B, Z, K, H] and v [B, Z, K, Hv], latent
    layers one part [B, Z, C + P], state layers their own parts [slots, *shape].
    """

    def __init__(self, group: int, layer: CacheLayerSpec, parts: dict[str, Array], touched: Array) -> None:
        self.group = group
        self.layer = layer
        self._parts: dict[str, Array] | None = parts
        self._touched = touched  # bool [B]

    @property
    def parts(self) -> dict[str, Array]:
        """The arrays by name. Raises DeviceError after `succeed`."""
        if self._parts is None:
            raise DeviceError(_STALE)
        return self._parts

    def succeed(self) -> Cache:
        """The handle that replaces this one, which is empty from now on."""
        successor = Cache(self.group, self.layer, self.parts, self._touched)
        self._parts = None
        return successor

    def touch(self, blocks: Any) -> None:
        """Fill blocks with NaN at their first use. (Filling the whole pool at once would take its memory
        from the host, used or not.)
        """
        ids = np.unique(np.asarray(blocks, np.int64))
        num_blocks = len(self._touched)
        if len(ids) and (ids[0] < 0 or ids[-1] >= num_blocks):
            outside = ids[(ids < 0) | (ids >= num_blocks)].tolist()
            raise DeviceError(
                f"blocks {outside} of cache group {self.group} were asked for, but it has {num_blocks}; "
                f"use ids from 0 to {num_blocks - 1}"
            )
        fresh = ids[~self._touched[ids]]
        for part in self.parts.values():
            part[fresh] = np.nan
        self._touched[fresh] = True

    def write(self, step: Step, *values: Array) -> Cache:
        """Store the real tokens' entries, one array [T, ...] per part, at their slots."""
        fields = step.paged(self.group)
        tokens = real_tokens(step)
        block, offset = np.divmod(fields.slots[tokens], fields.block_size)
        cache = self.succeed()
        cache.touch(block)
        for part, value in zip(cache.parts.values(), values, strict=True):
            part[block, offset] = value[tokens]
        return cache

    def read(self, step: Step, row: int, positions: Array) -> tuple[Array, ...]:
        """The entries of a row's positions [n], float64 [n, ...] per part."""
        fields = step.paged(self.group)
        block = fields.block_table[row, positions // fields.block_size]
        self.touch(block)
        offset = positions % fields.block_size
        return tuple(part[block, offset].astype(np.float64) for part in self.parts.values())


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


def supersede(state: State) -> State:
    """The State that replaces `state`, which may not be used again.

    Raises:
        DeviceError: `state` was used before.
    """
    check_fresh(state)
    last = state.last.copy()
    state.last[:] = USED_UP
    return State(tuple(cache.succeed() for cache in state.caches), last)


def check_fresh(state: State) -> None:
    """Raises DeviceError where `state` was used before."""
    if state.last[-1] == USED_UP:
        raise DeviceError(_STALE)


def part_shapes(layer: CacheLayerSpec, block_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of one block (or slot) and dtype of each part, in the order of the canonical form.

    Raises:
        UnsupportedError: a kind or dtype that this backend does not have.
    """
    if layer.kind == "state":
        parts = {part.name: (part.shape, part.dtype) for part in layer.state}
    elif layer.kind == "latent":
        parts = {"latent": ((block_size, layer.latent_size + layer.rope_size), layer.dtype)}
    elif layer.kind in ("paged", "window"):
        parts = {
            "k": ((block_size, layer.num_kv_heads, layer.head_size), layer.dtype),
            "v": ((block_size, layer.num_kv_heads, layer.v_head_size), layer.dtype),
        }
    else:
        raise UnsupportedError(
            f"a cache layer of kind {layer.kind!r} was asked of backend 'cpu_reference', which has paged, "
            "window, latent and state; choose another backend"
        )
    for name, (_, dtype) in parts.items():
        _check_dtype(f"cache part {name!r}", dtype)
    return parts


def _check_dtype(what: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{what} has dtype {dtype!r}, but backend 'cpu_reference' has {' and '.join(DTYPES)}; "
            "use one of them"
        )


class ReferenceAllocator:
    """See `core.contract.interfaces.MemoryAllocator`. `budget_bytes` None: what the host has available."""

    def __init__(self, device: ReferenceDevice, budget_bytes: int | None) -> None:
        self._device = device
        self._budget = budget_bytes
        self._used = 0

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """See the protocol."""
        return sum(
            math.prod(shape) * np.dtype(dtype).itemsize
            for shape, dtype in part_shapes(layer, block_size).values()
        )

    def allocate_state(self, plan: CachePlan) -> State:
        """See the protocol. Every entry reads as NaN."""
        from backends.cpu_reference.plugin import SPEC

        self._device.check_open()
        check_block_sizes(SPEC, [group.block_size for group in plan.groups if group.kind != "state"])
        groups = [plan.groups[g] for g in plan.group_of]
        last = np.zeros(plan.max_requests + 1, np.int32)
        wanted = last.nbytes + sum(
            group.num_blocks * self.block_bytes(layer, group.block_size)
            for layer, group in zip(plan.layers, groups, strict=True)
        )
        self._reserve("the cache", wanted)
        caches = []
        for layer, g in zip(plan.layers, plan.group_of, strict=True):
            num_blocks, block_size = plan.groups[g].num_blocks, plan.groups[g].block_size
            parts = {
                name: np.zeros((num_blocks, *shape), dtype)
                for name, (shape, dtype) in part_shapes(layer, block_size).items()
            }
            caches.append(Cache(g, layer, parts, np.zeros(num_blocks, np.bool_)))
        return State(tuple(caches), last)

    def free_state(self, state: State) -> None:
        """See the protocol."""
        state = supersede(state)
        self._used -= state.last.nbytes
        for cache in state.caches:
            self._used -= sum(part.nbytes for part in cache.parts.values())

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> Done:
        """See the protocol."""
        check_fresh(state)
        cache, ids = state.caches[layer], _ids(blocks)
        cache.touch(ids)
        return Done(tuple(part[ids] for part in cache.parts.values()))

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[Array, ...]
    ) -> State:
        """See the protocol."""
        state = supersede(state)
        cache, ids = state.caches[layer], _ids(blocks)
        cache.touch(ids)
        for part, values in zip(cache.parts.values(), data, strict=True):
            part[ids] = values
        return state

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """See the protocol."""
        state = supersede(state)
        read, write = _ids(src), _ids(dst)
        if len(read) != len(write):
            raise DeviceError(
                f"copy_blocks got {len(read)} sources and {len(write)} destinations; give pairs"
            )
        for cache in state.caches:
            if cache.group == group:
                cache.touch([*read, *write])
                for part in cache.parts.values():
                    part[write] = part[read].copy()
        return state

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """See the protocol."""
        state = supersede(state)
        for cache in state.caches:
            if cache.group == group:
                cache.touch(_ids(blocks))
                for part in cache.parts.values():
                    part[_ids(blocks)] = 0
        return state

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """See the protocol."""
        state = supersede(state)
        state.last[_ids(slots)] = np.asarray(tokens, np.int32)
        return state

    def pack(self, request: PackRequest) -> Array:
        """See the protocol. The canonical array, in the wanted dtype."""
        self._device.check_open()
        if request.scheme:
            raise UnsupportedError(
                f"{request.name} is quantized with {request.scheme!r}; backend 'cpu_reference' takes plain "
                "dtypes only; choose an unquantized checkpoint"
            )
        _check_dtype(request.name, request.dtype)
        wanted = math.prod(request.array.shape) * np.dtype(request.dtype).itemsize
        self._reserve(request.name, wanted)
        packed = np.array(request.array, request.dtype, order="C")
        weakref.finalize(packed, self._release, wanted).atexit = False
        return packed

    def unpack(self, packed: Array) -> Array:
        """See the protocol."""
        return packed.copy()

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """None: blocks move in canonical form only."""
        return ()

    def used_bytes(self) -> int:
        """See the protocol. A weight counts until nothing refers to it."""
        return self._used

    def _reserve(self, what: str, wanted: int) -> None:
        free = self._device.memory().free_bytes if self._budget is None else max(0, self._budget - self._used)
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)
        self._used += wanted

    def _release(self, num_bytes: int) -> None:
        self._used -= num_bytes


def _ids(blocks: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(blocks, np.int64).reshape(-1)
