"""An op table whose products are off by what two ranks may make them off.

Rule A allows a product y = x w^T over K terms, summed in float32, an error of gamma~_K(u) |x| |w|^T + u |y|
per element. Two ways of
summing it (whole, or in two halves added by a reduction, which itself allows u (|y_0| + |y_1|) <= u |x| |w|^T
and one rounding) may
differ by both their errors. `PerturbedOps` adds exactly that, with random signs, to every product of the
exact oracle: what then
reaches the logits is what the bound on each product means end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from conformance.tolerance import gamma_prob
from core.contract.ops import OPS, Ops
from core.contract.opspecs import ExpertsSpec, ExpertWeights
from core.contract.types import Array, Packed

_U = 2.0**-24


class PerturbedOps(Ops):
    """Wraps the oracle's table in float64; fused ops become composites, so that every product passes here."""

    def __init__(self, inner: Ops, seed: int) -> None:
        self._inner = inner
        self._random = np.random.default_rng(seed)
        for name, op in OPS.items():
            if op.kind == "plain" and name not in ("linear", "experts"):
                setattr(self, name, getattr(inner, name))

    def _signs(self, shape: tuple[int, ...]) -> Array:
        return self._random.choice([-1.0, 1.0], shape)

    def linear(self, x: Array, w: Packed, bias: Packed | None = None, *, wide: bool = False) -> Array:
        """The product, moved by twice its bound and by the reduction's."""
        y = self._inner.linear(x, w, bias, wide=wide)
        size = self._inner.linear(np.abs(x), np.abs(np.asarray(w)), None, wide=wide)
        bound = (2 * gamma_prob(x.shape[-1], _U) + _U) * size + 3 * _U * np.abs(y)
        return y + self._signs(y.shape) * bound

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
        """Each expert's two products through `linear`."""
        gate_up, down = np.asarray(packed.gate_up), np.asarray(packed.down)
        out = np.zeros_like(x)
        for t in range(x.shape[0]):
            for e, weight in zip(np.asarray(ids)[t], np.asarray(weights)[t], strict=True):
                inner: Any = self._inner.glu(self.linear(x[t : t + 1], gate_up[e]), spec.activation)
                out[t] += weight * self.linear(inner, down[e])[0]
        return out
