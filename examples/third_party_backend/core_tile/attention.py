"""Attention of backend `tile`: a row's queries against its blocks, one block after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.batch import Step
from core.contract.opspecs import AttentionSpec
from core_tile.allocator import Cache

Array = npt.NDArray[Any]
LOWEST = np.float32(-1e30)


def write(cache: Cache, step: Step, k: Array, v: Array) -> None:
    """Store the step's keys [T, K, H] and values [T, K, Hv]; what is padding goes into the pad block."""
    fields = step.groups[cache.group]
    block, offset = np.divmod(fields.slots, fields.block_size)
    keys, values = cache.canonical()
    keys[block, offset], values[block, offset] = k, v


def attend(q: Array, cache: Cache, step: Step, spec: AttentionSpec) -> tuple[Array, Array]:
    """q [T, N, H] -> (out [T, N, Hv], log-sum-exp [T, N])."""
    T, N, _ = q.shape
    out = np.zeros((T, N, spec.v_head_size), np.float32)
    lse = np.full((T, N), -np.inf, np.float32)
    for row in np.flatnonzero(step.seq_lens):
        first, end = int(step.query_start[row]), int(step.query_start[row + 1])
        if end > first:
            out[first:end], lse[first:end] = _row(q[first:end], cache, step, spec, int(row), first, end)
    return out, lse


def _row(
    q: Array, cache: Cache, step: Step, spec: AttentionSpec, row: int, first: int, end: int
) -> tuple[Array, Array]:
    """Running softmax over the blocks that the row's queries see."""
    K, Z = spec.num_kv_heads, step.groups[cache.group].block_size
    n, repeat = end - first, spec.num_heads // K
    positions = step.positions[first:end]  # [n]
    tiles = q.reshape(n, K, repeat, -1).transpose(1, 2, 0, 3).reshape(K, repeat * n, -1)
    at = np.tile(positions, repeat)  # [repeat n]
    top = np.full((K, repeat * n), LOWEST)
    total = np.zeros((K, repeat * n), np.float32)
    mean = np.zeros((K, repeat * n, spec.v_head_size), np.float32)
    length = int(step.seq_lens[row])
    oldest = 0 if spec.window is None else max(0, int(positions[0]) - spec.window + 1)
    for column in range(oldest // Z, -(-length // Z)):
        block = int(step.groups[cache.group].block_table[row, column])
        count = min(Z, length - column * Z)
        keys = np.arange(column * Z, column * Z + count)
        scores = np.float32(spec.scale) * (tiles @ cache.keys[block, :, :, :count])
        if spec.soft_cap is not None:
            scores = np.float32(spec.soft_cap) * np.tanh(scores / np.float32(spec.soft_cap))
        seen = keys <= at[:, None]
        if spec.window is not None:
            seen &= at[:, None] - keys < spec.window
        # What is not seen may hold anything, so it is replaced and not multiplied.
        scores = np.where(seen, scores, LOWEST)
        values = np.where(seen.any(0)[None, :, None], cache.values[block, :, :count], np.float32(0))
        peak = np.maximum(top, scores.max(-1))
        weights = np.where(seen, np.exp(scores - peak[..., None]), np.float32(0))
        kept = np.exp(top - peak)
        total = total * kept + weights.sum(-1)
        mean = mean * kept[..., None] + weights @ values
        top = peak
    mean /= np.maximum(total, np.float32(1e-30))[..., None]
    lse = top + np.log(np.maximum(total, np.float32(1e-30)))
    shape = (K, repeat, n)
    mean = mean.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(n, spec.num_heads, -1)
    return mean, lse.reshape(shape).transpose(2, 0, 1).reshape(n, spec.num_heads)
