"""Two more caches beside an engine's: one that a form's attention writes and reads, and the oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from conformance.constraints.forms import Derive, Float, Inputs, Pool
from conformance.levels.kernels import oracle
from core.contract.batch import Step, StepBatch
from core.contract.opspecs import AttentionSpec
from core.contract.requests import AllocatorRequest, OpsRequest
from core.contract.types import CachePlan

NEAR = 1e-10
"""Difference of two float64 sums of the same few hundred terms, relative to the largest result, at most."""
_DRAWN_HEADS = 2
"""Query heads per key head where inputs are drawn."""


class Shadow:
    """The caches of one engine's life.

    Attributes:
        layers: those with attention over blocks, in order; paged: those of them without a window.
    """

    def __init__(self, plan: CachePlan) -> None:
        self.layers = [i for i, layer in enumerate(plan.layers) if layer.kind in ("paged", "window")]
        self.paged = [i for i in self.layers if plan.layers[i].kind == "paged"]
        self._plan = plan
        self._touched: dict[int, set[int]] = {plan.group_of[i]: set() for i in self.layers}
        self._pools = {i: self._pool(i) for i in self.layers}
        wide = replace(plan, layers=tuple(replace(layer, dtype="float64") for layer in plan.layers))
        device = oracle().device
        self._allocator = oracle().handle.memory_allocator(AllocatorRequest(device=device))
        self._ops = oracle().handle.ops(OpsRequest(device=device, dtype="float64"))
        self._state = self._allocator.allocate_state(wide)

    def close(self) -> None:
        """Give the oracle's caches back."""
        self._allocator.free_state(self._state)

    def _pool(self, layer: int) -> Pool:
        spec, group = self._plan.layers[layer], self._plan.groups[self._plan.group_of[layer]]
        shape = (group.num_blocks, group.block_size, spec.num_kv_heads)
        return Pool(np.empty((*shape, spec.head_size)), np.empty((*shape, spec.v_head_size)))

    def touch(self, batch: StepBatch) -> None:
        """Fill blocks with NaN where a step names them first, and the pad block at every step."""
        for group, touched in self._touched.items():
            fresh = sorted({0, *batch.block_table(group).ravel().tolist()} - touched)
            touched.update(fresh[1:])
            for layer in self._plan.groups[group].layers:
                self._pools[layer].keys[fresh] = self._pools[layer].values[fresh] = np.nan

    def copy(self, group: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy blocks of a group (or state slots, which are nobody's here)."""
        if group in self._touched:
            self._touched[group].update(dst)
            for layer in self._plan.groups[group].layers:
                pool = self._pools[layer]
                pool.keys[list(dst)], pool.values[list(dst)] = pool.keys[list(src)], pool.values[list(src)]
        self._state = self._allocator.copy_blocks(self._state, group, src, dst)

    def drawn(self, batch: StepBatch, layer: int) -> Inputs:
        """Random inputs of one layer, the same for the same step."""
        spec, T = self._plan.layers[layer], batch.bucket.tokens
        rng = np.random.default_rng([batch.step_id, layer])
        K = spec.num_kv_heads
        return Inputs(
            rng.standard_normal((T, _DRAWN_HEADS * K, spec.head_size)),
            rng.standard_normal((T, K, spec.head_size)),
            rng.standard_normal((T, K, spec.v_head_size)),
            spec.head_size**-0.5,
        )

    def wanted(self, batch: StepBatch, layer: int, x: Inputs) -> Float:
        """What the oracle gives for the real tokens: [num_tokens, N, Hv]."""
        step = Step.of(batch.layout, self._plan, batch.flat, self._state.last)
        spec = AttentionSpec(
            scale=x.scale,
            num_heads=x.q.shape[1],
            num_kv_heads=x.k.shape[1],
            head_size=x.q.shape[2],
            v_head_size=x.v.shape[2],
        )
        caches = list(self._state.caches)
        found, _, caches[layer] = self._ops.attend(x.q, x.k, x.v, caches[layer], step, spec)
        self._state = self._state._replace(caches=tuple(caches))
        out: Float = np.asarray(found, np.float64)[: batch.num_tokens]
        return out

    def found(self, batch: StepBatch, layer: int, x: Inputs, derive: Derive) -> Float:
        """What a form's attention gives for the real tokens.

        Raises:
            ValueError, TypeError, IndexError: the form cannot be derived or used.
        """
        form = derive(batch, self._plan.group_of[layer])
        return form.attend(x, self._pools[layer])[: batch.num_tokens]


def distance(found: Float, wanted: Float) -> tuple[float, int]:
    """Largest error relative to the largest result, and the first token that is further away than `NEAR`, or
    -1.
    """
    scale = float(np.abs(wanted).max(initial=np.finfo(np.float64).tiny))
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(found - wanted) / scale, nan=np.inf, posinf=np.inf)
    far = np.flatnonzero((error > NEAR).any((1, 2)))
    return float(error.max(initial=0.0)), int(far[0]) if len(far) else -1
