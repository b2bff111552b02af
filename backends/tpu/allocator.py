"""Device memory of one model: cache arrays per layer, state slots, and weights as jax arrays.

Every change of a cache donates the old arrays, so that the compiler may write in place. Index lists are
padded to a power of two with an index past the end, which is dropped: one compilation serves many lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from backends.tpu.attention import LatentCache, PagedCache
from backends.tpu.device import TpuDevice, device_errors
from backends.tpu.plugin import SPEC
from backends.tpu.state import StateCache
from core.contract.errors import OutOfMemoryError, UnsupportedError
from core.contract.spec import check_block_sizes, check_capabilities
from core.contract.types import Array, BlockRegion, CacheLayerSpec, CachePlan, Packed, PackRequest, State

Cache = PagedCache | LatentCache | StateCache

WIDE_USES = frozenset({"norm", "bias", "constant"})


def _layer_arrays(layer: CacheLayerSpec) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape per token, or per slot for state; dtype) of each array of a layer."""
    if layer.kind == "state":
        return tuple((part.shape, part.dtype) for part in layer.state)
    if layer.kind == "latent":
        return (((layer.latent_size + layer.rope_size,), layer.dtype),)
    heads = layer.num_kv_heads
    return (((heads, layer.head_size), layer.dtype), ((heads, layer.v_head_size), layer.dtype))


def _arrays(cache: Cache) -> tuple[jax.Array, ...]:
    """The arrays of a layer, in canonical order."""
    if isinstance(cache, PagedCache):
        return (cache.k, cache.v)
    return (cache.c,) if isinstance(cache, LatentCache) else cache.parts


def _with_arrays(cache: Cache, arrays: tuple[jax.Array, ...]) -> Cache:
    if isinstance(cache, PagedCache):
        return replace(cache, k=arrays[0], v=arrays[1])
    return replace(cache, c=arrays[0]) if isinstance(cache, LatentCache) else replace(cache, parts=arrays)


def _blocks(x: jax.Array, num_blocks: int) -> jax.Array:
    """[num_blocks * Z, ...] -> [num_blocks, Z, ...]; for state, Z is 1."""
    return x.reshape(num_blocks, x.shape[0] // num_blocks, *x.shape[1:])


@partial(jax.jit, static_argnums=2)
def _gather(arrays: tuple[jax.Array, ...], ids: jax.Array, num_blocks: int) -> tuple[jax.Array, ...]:
    return tuple(_blocks(x, num_blocks).at[ids].get(mode="fill", fill_value=0) for x in arrays)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _scatter(
    arrays: tuple[jax.Array, ...], ids: jax.Array, data: tuple[jax.Array, ...], num_blocks: int
) -> tuple[jax.Array, ...]:
    return tuple(
        _blocks(x, num_blocks).at[ids].set(d, mode="drop").reshape(x.shape)
        for x, d in zip(arrays, data, strict=True)
    )


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _copy(
    arrays: tuple[jax.Array, ...], src: jax.Array, dst: jax.Array, num_blocks: int
) -> tuple[jax.Array, ...]:
    def one(x: jax.Array) -> jax.Array:
        blocks = _blocks(x, num_blocks)
        return blocks.at[dst].set(blocks[src], mode="drop").reshape(x.shape)

    return tuple(one(x) for x in arrays)


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def _zero(arrays: tuple[jax.Array, ...], ids: jax.Array, num_blocks: int) -> tuple[jax.Array, ...]:
    return tuple(_blocks(x, num_blocks).at[ids].set(0, mode="drop").reshape(x.shape) for x in arrays)


@partial(jax.jit, donate_argnums=0)
def _set_last(last: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    return last.at[slots].set(tokens, mode="drop")


class _Export:
    """Blocks on their way to the host."""

    def __init__(self, arrays: tuple[Array, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
        self._arrays, self._shapes = arrays, shapes

    def is_ready(self) -> bool:
        """Whether every array has arrived."""
        return all(x.is_ready() for x in self._arrays)

    def get(self) -> tuple[npt.NDArray[Any], ...]:
        """Wait; the canonical host arrays."""
        with device_errors("exporting blocks"):
            return tuple(
                np.array(x)[: shape[0]].reshape(shape)
                for x, shape in zip(self._arrays, self._shapes, strict=True)
            )


class TpuAllocator:
    """Allocator of one model on one device; see `MemoryAllocator`."""

    def __init__(self, device: TpuDevice, budget_bytes: int | None) -> None:
        self._device = device
        self._budget = budget_bytes
        self._used = 0
        self._plan: CachePlan | None = None

    def block_bytes(self, layer: CacheLayerSpec, block_size: int) -> int:
        """Bytes of one block or slot, as jax counts them."""
        per_entry = sum(
            int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in _layer_arrays(layer)
        )
        return per_entry if layer.kind == "state" else per_entry * block_size

    def allocate_state(self, plan: CachePlan) -> State:
        """One zeroed array per part of each layer."""
        check_capabilities(SPEC, plan)
        check_block_sizes(SPEC, [group.block_size for group in plan.groups if group.kind != "state"])
        wanted = 4 * (plan.max_requests + 1)
        for i, layer in enumerate(plan.layers):
            self._check_layer(i, layer)
            group = plan.groups[plan.group_of[i]]
            wanted += group.num_blocks * self.block_bytes(layer, group.block_size)
        self._reserve("the cache", wanted)
        place = self._device.handle
        with device_errors("the cache", wanted), jax.default_device(place):
            caches = tuple(self._new_cache(plan, i) for i in range(len(plan.layers)))
            last = jnp.zeros(plan.max_requests + 1, jnp.int32)
            state: State = jax.device_put(State(caches, last), place)
            jax.block_until_ready(state)  # type: ignore[no-untyped-call]
        self._plan = plan
        self._used += wanted
        return state

    def _new_cache(self, plan: CachePlan, index: int) -> Cache:
        layer, g = plan.layers[index], plan.group_of[index]
        group = plan.groups[g]
        entries = group.num_blocks * (1 if layer.kind == "state" else group.block_size)
        arrays = tuple(jnp.zeros((entries, *shape), dtype) for shape, dtype in _layer_arrays(layer))
        if layer.kind == "state":
            return StateCache(arrays, g, layer)
        if layer.kind == "latent":
            return LatentCache(arrays[0], g, layer)
        return PagedCache(arrays[0], arrays[1], g, layer)

    def _check_layer(self, index: int, layer: CacheLayerSpec) -> None:
        dtypes = {dtype for _, dtype in _layer_arrays(layer)}
        if not dtypes <= set(SPEC.dtypes):
            raise UnsupportedError(
                f"cache layer {index} has dtype {sorted(dtypes)}, but backend 'tpu' declares {SPEC.dtypes}; "
                "choose one of these for the cache"
            )

    def _reserve(self, what: str, wanted: int) -> None:
        free = self._device.memory().free_bytes if self._budget is None else max(0, self._budget - self._used)
        if wanted > free:
            raise OutOfMemoryError(what, wanted, free)

    def free_state(self, state: State) -> None:
        """Delete the arrays at once."""
        for leaf in jax.tree.leaves(state):
            if not leaf.is_deleted():
                self._used -= leaf.nbytes
                leaf.delete()

    def export_blocks(self, state: State, layer: int, blocks: Sequence[int]) -> _Export:
        """Gathered on the device in submission order, so later steps cannot change the copy."""
        cache = state.caches[layer]
        num_blocks = self._num_blocks(cache.group)
        found = _gather(_arrays(cache), self._ids(blocks, num_blocks), num_blocks)
        n = len(blocks)
        if isinstance(cache, StateCache):
            shapes = tuple((n, *x.shape[2:]) for x in found)
        else:
            shapes = tuple((n, *x.shape[1:]) for x in found)
        return _Export(found, shapes)

    def import_blocks(
        self, state: State, layer: int, blocks: Sequence[int], data: tuple[npt.NDArray[Any], ...]
    ) -> State:
        """Blocks in canonical form, bit by bit."""
        cache = state.caches[layer]
        arrays = _arrays(cache)
        num_blocks = self._num_blocks(cache.group)
        ids = self._ids(blocks, num_blocks)
        padded = []
        for x, d in zip(arrays, data, strict=True):
            shape = (len(blocks), x.shape[0] // num_blocks, *x.shape[1:])
            host = np.zeros((len(ids), *shape[1:]), x.dtype)
            host[: len(blocks)] = np.asarray(d).astype(x.dtype).reshape(shape)
            padded.append(self._device.put(host))
        new = _with_arrays(cache, _scatter(arrays, ids, tuple(padded), num_blocks))
        return state._replace(caches=(*state.caches[:layer], new, *state.caches[layer + 1 :]))

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        """One gather and one scatter per array, so all reads come first."""
        if len(src) != len(dst):
            raise ValueError(f"copy_blocks got {len(src)} sources and {len(dst)} destinations; give pairs")
        num_blocks = self._num_blocks(group)
        sources, destinations = self._ids(src, num_blocks), self._ids(dst, num_blocks)
        return self._change(state, group, lambda a: _copy(a, sources, destinations, num_blocks))

    def zero_blocks(self, state: State, group: int, blocks: Sequence[int]) -> State:
        """Zeros in every layer of the group."""
        num_blocks = self._num_blocks(group)
        ids = self._ids(blocks, num_blocks)
        return self._change(state, group, lambda a: _zero(a, ids, num_blocks))

    def _change(self, state: State, group: int, change: Any) -> State:
        caches = tuple(_with_arrays(c, change(_arrays(c))) if c.group == group else c for c in state.caches)
        return state._replace(caches=caches)

    def set_last(self, state: State, slots: Sequence[int], tokens: Sequence[int]) -> State:
        """Tokens into their slots."""
        size = int(state.last.shape[0])
        ids = self._ids(slots, size, "request slot")
        padded = np.zeros(len(ids), np.int32)
        padded[: len(tokens)] = tokens
        return state._replace(last=_set_last(state.last, ids, self._device.put(padded)))

    def _num_blocks(self, group: int) -> int:
        if self._plan is None:
            raise UnsupportedError("the allocator holds no state yet; call allocate_state first")
        return self._plan.groups[group].num_blocks

    def _ids(self, ids: Sequence[int], size: int, what: str = "block") -> jax.Array:
        """int32, padded with `size`."""
        wrong = [i for i in ids if not 0 <= i < size]
        if wrong:
            raise IndexError(f"{what} {wrong[0]} is outside [0, {size}); use an id of this cache")
        padded = np.full(1 << max(0, len(ids) - 1).bit_length(), size, np.int32)
        padded[: len(ids)] = ids
        return self._device.put(padded)

    def pack(self, request: PackRequest) -> Packed:
        """The array itself on the device; norms, biases and constants in float32, integers in int32."""
        check_capabilities(SPEC, request)
        host = np.asarray(request.array)
        if host.dtype.kind in "iu":
            dtype = "int32"
        elif request.dtype not in SPEC.dtypes:
            raise UnsupportedError(
                f"parameter {request.name!r} is wanted in {request.dtype}, but backend 'tpu' declares "
                f"{SPEC.dtypes}; choose one of these"
            )
        else:
            dtype = "float32" if request.uses and set(request.uses) <= WIDE_USES else request.dtype
        wanted = host.size * jnp.dtype(dtype).itemsize
        self._reserve(f"parameter {request.name!r}", wanted)
        with device_errors(f"parameter {request.name!r}", wanted):
            packed = self._device.put(host.astype(jnp.dtype(dtype), copy=False))
        self._used += wanted
        return packed

    def unpack(self, packed: Packed) -> npt.NDArray[Any]:
        """The array in the packed dtype."""
        return np.array(packed)

    def regions(self, state: State, layer: int, block: int) -> tuple[BlockRegion, ...]:
        """(): jax arrays have no address that stays."""
        return ()

    def used_bytes(self) -> int:
        """Caches and every parameter packed so far."""
        return self._used
