"""The op table of a tensor-parallel rank: the backend's own, with the collectives that cut weights ask for.

Models know nothing of it: weights that need a collective arrive wrapped in `Sharded`, all others as the
backend packed them. A sum over ranks rounds its terms to the activation dtype and adds in float32.
"""

from __future__ import annotations

from typing import Any

from core.contract.batch import Step
from core.contract.interfaces import Communicator
from core.contract.ops import OPS, Ops
from core.contract.opspecs import ExpertsSpec, ExpertWeights
from core.contract.types import Array, Packed
from core.parallel.sharding import Sharded


class TensorParallelOps(Ops):
    """Wraps a backend's table; `communicator` joins the ranks that share each layer."""

    def __init__(self, inner: Ops, communicator: Communicator) -> None:
        self._inner = inner
        self._communicator = communicator
        for name in OPS:
            if getattr(TensorParallelOps, name) is getattr(Ops, name):
                setattr(self, name, getattr(inner, name))

    def _own(self, bias: Packed | None) -> Packed | None:
        """A bias belongs to one term of the sum."""
        return bias if self._communicator.rank == 0 else None

    def linear(self, x: Array, w: Packed, bias: Packed | None = None, *, wide: bool = False) -> Array:
        """As `Ops.linear`, complete on every rank."""
        if not isinstance(w, Sharded):
            return self._inner.linear(x, w, bias, wide=wide)
        if w.reduces:
            return self._communicator.all_reduce(self._inner.linear(x, w.value, self._own(bias), wide=wide))
        return self._communicator.all_gather(self._inner.linear(x, w.value, bias, wide=wide), -1)

    def embed_step(self, w: Packed, step: Step, scale: float | None = None) -> Array:
        """As `Ops.embed_step`; each rank looks up the rows it holds."""
        if not isinstance(w, Sharded):
            return self._inner.embed_step(w, step, scale)
        rows = self._inner.embed(w.value, self._inner.select_tokens(step), w.first)
        h = self._communicator.all_reduce(rows)
        return h if scale is None else h * scale

    def norm_linear(self, h: Array, n: Packed, w: Packed, eps: float, bias: Packed | None = None) -> Array:
        """As `Ops.norm_linear`."""
        if not isinstance(w, Sharded):
            return self._inner.norm_linear(h, n, w, eps, bias)
        return self.linear(self._inner.norm(h, n, eps), w, bias)

    def linear_add(self, x: Array, w: Packed, h: Array, bias: Packed | None = None) -> Array:
        """As `Ops.linear_add`."""
        if not isinstance(w, Sharded):
            return self._inner.linear_add(x, w, h, bias)
        return self._inner.residual_add(h, self.linear(x, w, bias))

    def linear_norm_add(
        self, x: Array, w: Packed, n: Packed, h: Array, eps: float, bias: Packed | None = None
    ) -> Array:
        """As `Ops.linear_norm_add`."""
        if not isinstance(w, Sharded):
            return self._inner.linear_norm_add(x, w, n, h, eps, bias)
        return self._inner.residual_add(h, self._inner.norm(self.linear(x, w, bias), n, eps))

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
        """As `Ops.experts`; each rank holds a share of every expert's width."""
        down: Any = packed.down
        if not isinstance(down, Sharded):
            return self._inner.experts(x, ids, weights, packed, spec, slot_of_expert, tokens_per_rank)
        local = packed._replace(down=down.value, down_bias=self._own(packed.down_bias))
        y = self._inner.experts(x, ids, weights, local, spec, slot_of_expert, tokens_per_rank)
        return self._communicator.all_reduce(y)

    def head_logits(
        self, h: Array, n: Packed, w: Packed, step: Step, eps: float, soft_cap: float | None = None
    ) -> Array:
        """As `Ops.head_logits`, of the whole vocabulary on every rank."""
        if not isinstance(w, Sharded):
            return self._inner.head_logits(h, n, w, step, eps, soft_cap)
        if not step.bucket.outputs.all_logits:
            h = self._inner.take(h, step.sample_rows)
        logits = self.linear(self._inner.norm(h, n, eps), w, wide=True)
        return logits if soft_cap is None else self._inner.soft_cap(logits, soft_cap)
