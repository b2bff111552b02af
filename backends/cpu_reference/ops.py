"""The op table: every op computed in float64 and rounded once to the table's dtype.

Nothing is inherited. A fused op rounds nothing in between, so it is at least as close to the exact value as
the plain ops one after another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference import attention, state
from backends.cpu_reference import experts as moe
from backends.cpu_reference.allocator import DTYPES, Cache
from backends.cpu_reference.arithmetic import activate, capped, glu, product, rms_norm, rotate, wide
from core.contract.batch import Step
from core.contract.errors import UnsupportedError
from core.contract.ops import Ops
from core.contract.opspecs import (
    Activation,
    AttentionSpec,
    ConvSpec,
    ExpertsSpec,
    ExpertWeights,
    LatentSpec,
    Rope,
    RouteSpec,
    ScanSpec,
)

Array = npt.NDArray[Any]


class ReferenceOps(Ops):
    """See `core.contract.ops.Ops`, whose docstrings say what each op means.

    Raises:
        UnsupportedError: a dtype other than float64 and float32.
    """

    def __init__(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise UnsupportedError(
                f"dtype {dtype!r} was asked for, but backend 'cpu_reference' has {' and '.join(DTYPES)}; "
                "use one of them"
            )
        self._dtype = np.dtype(dtype)

    def _round(self, x: Array) -> Array:
        return x.astype(self._dtype)

    def select_tokens(self, step: Step) -> Array:
        """See `Ops`."""
        ids = step.token_ids.copy()
        for t, slot in enumerate(step.token_source):
            if slot >= 0:
                ids[t] = step.last[slot]
        return ids

    def embed(self, w: Array, ids: Array, first: int = 0) -> Array:
        """See `Ops`."""
        out = np.zeros((len(ids), w.shape[1]))
        for t, token in enumerate(ids):
            if first <= token < first + len(w):
                out[t] = w[token - first]
        return self._round(out)

    def take(self, x: Array, rows: Array) -> Array:
        """See `Ops`."""
        return x[rows]

    def linear(self, x: Array, w: Array, bias: Array | None = None, *, wide: bool = False) -> Array:
        """See `Ops`. A wide result is not rounded at all."""
        y = product(x, w, bias)
        return y if wide else self._round(y)

    def norm(self, x: Array, n: Array | None, eps: float) -> Array:
        """See `Ops`."""
        return self._round(rms_norm(x, n, eps))

    def rope(self, x: Array, rope: Rope, step: Step) -> Array:
        """See `Ops`."""
        return self._round(rotate(x, rope.table, step.positions, rope.spec))

    def glu(self, x: Array, activation: Activation) -> Array:
        """See `Ops`."""
        return self._round(glu(x, activation))

    def gate(self, x: Array, g: Array, activation: Activation) -> Array:
        """See `Ops`."""
        return self._round(wide(x) * activate(wide(g), activation))

    def soft_cap(self, x: Array, cap: float) -> Array:
        """See `Ops`. The result has x's dtype: logits come wide."""
        return capped(x, cap).astype(x.dtype)

    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: Cache,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, Cache]:
        """See `Ops`. The log-sum-exp is float64."""
        out, lse, cache = attention.attend(q, k, v, cache, step, spec, sinks)
        return self._round(out), lse if want_lse else None, cache

    def attend_latent(
        self,
        q_nope: Array,
        q_rope: Array,
        latent: Array | None,
        k_rope: Array | None,
        w_k: Array,
        w_v: Array,
        cache: Cache,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, Cache]:
        """See `Ops`. The log-sum-exp is float64."""
        out, lse, cache = attention.attend_latent(q_nope, q_rope, latent, k_rope, w_k, w_v, cache, step, spec)
        return self._round(out), lse if want_lse else None, cache

    def short_conv(
        self, x: Array, w: Array, bias: Array | None, cache: Cache, step: Step, spec: ConvSpec
    ) -> tuple[Array, Cache]:
        """See `Ops`."""
        out, cache = state.short_conv(x, w, bias, cache, step, spec)
        return self._round(out), cache

    def state_scan(
        self,
        q: Array,
        k: Array,
        v: Array,
        a: Array,
        b: Array,
        a_log: Array,
        dt_bias: Array,
        cache: Cache,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[Array, Cache]:
        """See `Ops`."""
        out, cache = state.gated_delta(q, k, v, a, b, a_log, dt_bias, cache, step, spec)
        return self._round(out), cache

    def route(self, logits: Array, spec: RouteSpec, bias: Array | None = None) -> tuple[Array, Array]:
        """See `Ops`. Weights are float64."""
        return moe.route(logits, spec, bias)

    def experts(
        self,
        x: Array,
        ids: Array,
        weights: Array,
        packed: ExpertWeights,
        spec: ExpertsSpec,
        slot_of_expert: Array | None = None,
        tokens_per_rank: Array | None = None,
    ) -> Array:
        """See `Ops`."""
        if tokens_per_rank is not None:
            raise UnsupportedError(
                "experts got tokens_per_rank, but backend 'cpu_reference' runs on one rank; pass None"
            )
        return self._round(moe.experts(x, ids, weights, packed, spec, slot_of_expert))

    def embed_step(self, w: Array, step: Step, scale: float | None = None) -> Array:
        """See `Ops`."""
        h = wide(self.embed(w, self.select_tokens(step)))
        return self._round(h if scale is None else h * scale)

    def norm_linear(self, h: Array, n: Array, w: Array, eps: float, bias: Array | None = None) -> Array:
        """See `Ops`."""
        return self._round(product(rms_norm(h, n, eps), w, bias))

    def linear_add(self, x: Array, w: Array, h: Array, bias: Array | None = None) -> Array:
        """See `Ops`."""
        return self._round(wide(h) + product(x, w, bias))

    def norm_linear_glu(self, h: Array, n: Array, w: Array, eps: float, activation: Activation) -> Array:
        """See `Ops`."""
        return self._round(glu(product(rms_norm(h, n, eps), w), activation))

    def linear_norm_add(
        self, x: Array, w: Array, n: Array, h: Array, eps: float, bias: Array | None = None
    ) -> Array:
        """See `Ops`."""
        return self._round(wide(h) + rms_norm(product(x, w, bias), n, eps))

    def residual_add(self, h: Array, x: Array) -> Array:
        """See `Ops`."""
        return self._round(wide(h) + wide(x))

    def norm_gate(self, x: Array, n: Array, g: Array, eps: float, activation: Activation) -> Array:
        """See `Ops`."""
        return self._round(rms_norm(x, n, eps) * activate(wide(g), activation))

    def norm_rope_attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        qn: Array | None,
        kn: Array | None,
        eps: float,
        rope: Rope | None,
        cache: Cache,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
    ) -> tuple[Array, Cache]:
        """See `Ops`."""
        q, k = wide(q), wide(k)
        if qn is not None:
            q = rms_norm(q, qn, eps)
        if kn is not None:
            k = rms_norm(k, kn, eps)
        if rope is not None:
            q = rotate(q, rope.table, step.positions, rope.spec)
            k = rotate(k, rope.table, step.positions, rope.spec)
        out, _, cache = attention.attend(q, k, v, cache, step, spec, sinks)
        return self._round(out), cache

    def norm_rope_attend_latent(
        self,
        q: Array,
        kv: Array,
        kvn: Array,
        eps: float,
        rope: Rope,
        w_k: Array,
        w_v: Array,
        cache: Cache,
        step: Step,
        spec: LatentSpec,
    ) -> tuple[Array, Cache]:
        """See `Ops`."""
        C = spec.latent_size
        latent = rms_norm(kv[:, :C], kvn, eps)
        k_rope = rotate(kv[:, None, C:], rope.table, step.positions, rope.spec)[:, 0]  # [T, P]
        q_rope = rotate(q[:, :, spec.nope_size :], rope.table, step.positions, rope.spec)
        out, _, cache = attention.attend_latent(
            q[:, :, : spec.nope_size], q_rope, latent, k_rope, w_k, w_v, cache, step, spec
        )
        return self._round(out), cache

    def head_logits(
        self, h: Array, n: Array, w: Array, step: Step, eps: float, soft_cap: float | None = None
    ) -> Array:
        """See `Ops`. Logits are float64."""
        rows = h if step.bucket.outputs.all_logits else h[step.sample_rows]
        logits = product(rms_norm(rows, n, eps), w)
        return logits if soft_cap is None else capped(logits, soft_cap)
