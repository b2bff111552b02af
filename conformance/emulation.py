"""The ops once more in the precision that a backend declares: what rule B compares a backend's error with.

Plain NumPy that rounds where the contract lets a backend round: products and partial sums to the accumulator,
one after the other in the plainest order; attention's weights to their declared dtype; each plain op's result
to the compute dtype. Between ops values are float64 arrays that hold numbers of the compute dtype, so the
tables run on the reference backend's weights, caches and programs. Fused ops are the composites of the
contract, so they round between their plain ops.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
import numpy.typing as npt

from conformance.dense import erf, seen
from conformance.tolerance import Precision
from core.contract.batch import Step
from core.contract.errors import PluginError
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


class EmulatedOps(Ops):
    """An op table of a precision over arrays and caches of the reference backend in float64.

    Args:
        base: the reference backend's table; it looks up, chooses experts and knows the caches.
        precision: where to round, and how far functions may be off.
        expand: latent attention expands keys and values and rounds them, in place of the query.
    """

    def __init__(self, base: Ops, precision: Precision, *, expand: bool = False) -> None:
        self._base, self._expand = base, expand
        self._out = np.dtype(precision.out)
        self._acc = np.dtype(precision.accumulator)
        self._weights = np.dtype(precision.probability or self._acc)
        # What the contract keeps in float32 at least: states, routing weights, log-sum-exp, wide products.
        self._kept = np.dtype("float64" if precision.out == "float64" else "float32")
        self._function_error = precision.exp * precision.u_acc
        self._noise = np.random.default_rng(0)

    def _function(self, x: Any) -> Array:
        """What a backend's exp, tanh, ... may give for x: off by any part of the error that is declared."""
        x = np.asarray(x)
        off = self._noise.uniform(-self._function_error, self._function_error, x.shape)
        return np.asarray((x * (1 + off)).astype(self._acc))

    def _wide(self, x: Any) -> Array:
        return np.asarray(x).astype(self._acc)

    def _rounded(self, x: Any) -> Array:
        return self._wide(x).astype(self._out).astype(np.float64)

    # Look-ups round nothing.

    def select_tokens(self, step: Step) -> Array:
        return self._ids(self._base.select_tokens(step))

    def _ids(self, x: Any) -> Array:
        return np.asarray(x)

    def embed(self, w: Array, ids: Array, first: int = 0) -> Array:
        return self._rounded(self._base.embed(w, ids, first))

    def take(self, x: Array, rows: Array) -> Array:
        return self._ids(self._base.take(x, rows))

    # Products, norms, activations

    def _product(self, x: Any, w: Any, bias: Any | None = None) -> Array:
        """x [..., D] w [O, D]^T, in the accumulator: [..., O]."""
        x, columns = self._wide(x), np.ascontiguousarray(self._wide(w).T)
        y = np.zeros((*x.shape[:-1], columns.shape[1]), self._acc)
        for d, column in enumerate(columns):
            y += x[..., d, None] * column
        return y if bias is None else y + self._wide(bias)

    def linear(self, x: Array, w: Array, bias: Array | None = None, *, wide: bool = False) -> Array:
        y = self._product(x, w, bias)
        return y.astype(self._kept).astype(np.float64) if wide else self._rounded(y)

    def norm(self, x: Array, n: Array | None, eps: float) -> Array:
        x = self._wide(x)
        mean = np.add.accumulate(x * x, -1)[..., -1:] / self._acc.type(x.shape[-1])
        y = x / np.sqrt(mean + self._acc.type(eps))
        return self._rounded(y if n is None else y * self._wide(n))

    def rope(self, x: Array, rope: Rope, step: Step) -> Array:
        table, spec = rope
        y, half = self._wide(x), spec.rotary_size // 2
        angles = self._wide(table[step.positions])[:, None]
        cos, sin = angles[..., :half], angles[..., half:]
        first, second = slice(0, half), slice(half, spec.rotary_size)
        if spec.interleaved:
            first, second = slice(0, spec.rotary_size, 2), slice(1, spec.rotary_size, 2)
        a, b = y[..., first].copy(), y[..., second].copy()
        y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
        return self._rounded(y)

    def _activated(self, x: Array, activation: Activation) -> Array:
        """An activation of one argument, in the accumulator."""
        one = self._acc.type
        if activation == "silu":
            return np.asarray(x / (1 + self._function(np.exp(-x))))
        if activation == "sigmoid":
            return np.asarray(1 / (1 + self._function(np.exp(-x))))
        if activation == "gelu":
            return np.asarray(one(0.5) * x * (1 + self._function(erf(x * one(0.5**0.5)))))
        inner = one((2 / np.pi) ** 0.5) * (x + one(0.044715) * x * x * x)
        return np.asarray(one(0.5) * x * (1 + self._function(np.tanh(inner))))

    def _glu(self, x: Array, activation: Activation, limit: float | None) -> Array:
        a, up = np.split(self._wide(x), 2, -1)
        if activation != "swigluoai":
            return np.asarray(self._activated(a, activation) * up)
        if limit is not None:
            a, up = np.minimum(a, self._acc.type(limit)), np.clip(up, -limit, limit).astype(self._acc)
        return np.asarray((up + 1) * a * self._activated(self._acc.type(1.702) * a, "sigmoid"))

    def glu(self, x: Array, activation: Activation) -> Array:
        with np.errstate(over="ignore"):
            return self._rounded(self._glu(x, activation, 7.0))

    def gate(self, x: Array, g: Array, activation: Activation) -> Array:
        with np.errstate(over="ignore"):
            return self._rounded(self._wide(x) * self._activated(self._wide(g), activation))

    def _capped(self, x: Array, cap: float) -> Array:
        return np.asarray(self._acc.type(cap) * self._function(np.tanh(x / self._acc.type(cap))))

    def soft_cap(self, x: Array, cap: float) -> Array:
        return self._rounded(self._capped(self._wide(x), cap))

    # Attention

    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: Any,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, Any]:
        if k is not None and v is not None:
            cache = cache.write(step, k, v)
        T, N = q.shape[:2]
        out, lse = np.zeros((T, N, spec.v_head_size)), np.full((T, N), -np.inf)
        heads = np.arange(N) // (N // spec.num_kv_heads)
        for number, tokens, length in rows_of(step):
            mask, at = _visible(step, tokens, length, spec)
            if not len(at):
                continue
            keys, values = (self._wide(part[:, heads]) for part in cache.read(step, number, at))
            x = self._wide(q[tokens])
            if spec.q_scale is not None:
                grown = ((step.positions[tokens] + 1) // spec.q_scale.floor).astype(self._acc)
                x = (
                    x
                    * (1 + self._acc.type(spec.q_scale.factor) * self._function(np.log1p(grown)))[
                        :, None, None
                    ]
                )
            scores = self._scores(x, keys) * self._acc.type(spec.scale)
            if spec.soft_cap is not None:
                scores = self._capped(scores, spec.soft_cap)
            y, lse[tokens] = self._weighed(scores, mask, values, sinks)
            out[tokens] = self._rounded(y)
        return out, lse if want_lse else None, cache

    def _scores(self, q: Array, keys: Array) -> Array:
        """q [n, N, H], keys [m, N, H] -> [N, n, m]."""
        scores = np.zeros((q.shape[1], len(q), len(keys)), self._acc)
        for h in range(q.shape[-1]):
            scores += q[:, :, h].T[:, :, None] * keys[:, :, h].T[:, None, :]
        return scores

    def _weighed(self, scores: Array, mask: Array, values: Array, sinks: Array | None) -> tuple[Array, Array]:
        """Scores [N, n, m] of keys that `mask` [n, m] shows, values [m, N, Hv] -> [n, N, Hv], lse [n, N]."""
        scores = np.where(mask, scores, self._acc.type(-np.inf))
        top = scores.max(-1, keepdims=True)
        if sinks is not None:
            sink = self._wide(sinks)[:, None, None]
            top = np.maximum(top, sink)
        e = self._function(np.exp(scores - top))
        total = np.add.accumulate(e, -1)[..., -1:]
        if sinks is not None:
            total = total + self._function(np.exp(sink - top))
        e = e.astype(self._weights).astype(self._acc)
        y = np.zeros((*e.shape[:2], values.shape[-1]), self._acc)
        for j in range(len(values)):
            y += e[:, :, j, None] * values[j][:, None, :]
        return (y / total).transpose(1, 0, 2), (top + self._function(np.log(total)))[..., 0].T.astype(
            self._kept
        )

    def attend_latent(
        self,
        q_nope: Array,
        q_rope: Array,
        latent: Array | None,
        k_rope: Array | None,
        w_k: Array,
        w_v: Array,
        cache: Any,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, Any]:
        if latent is not None and k_rope is not None:
            cache = cache.write(step, np.concatenate([latent, k_rope], -1))
        N, C = spec.num_heads, spec.latent_size
        to_keys, to_values = w_k.reshape(N, -1, C), w_v.reshape(N, -1, C)
        T = len(q_nope)
        out, lse = np.zeros((T, N, spec.v_head_size)), np.full((T, N), -np.inf)
        reach = AttentionSpec(scale=1.0, num_heads=N, num_kv_heads=1, head_size=C, v_head_size=C)
        for number, tokens, length in rows_of(step):
            mask, at = _visible(step, tokens, length, reach)
            (entries,) = cache.read(step, number, at)
            c, r = entries[:, :C], np.repeat(entries[:, None, C:], N, 1)
            if self._expand:
                keys = self._per_head(np.repeat(c[:, None], N, 1), to_keys)
                values, q = self._per_head(np.repeat(c[:, None], N, 1), to_values), q_nope[tokens]
            else:
                keys = values = np.repeat(c[:, None], N, 1)
                q = self._per_head(q_nope[tokens], to_keys.transpose(0, 2, 1))
            q, keys = np.concatenate([q, q_rope[tokens]], -1), np.concatenate([keys, r], -1)
            scores = self._scores(self._wide(q), self._wide(keys)) * self._acc.type(spec.scale)
            y, lse[tokens] = self._weighed(scores, mask, self._wide(values), None)
            out[tokens] = self._rounded(y) if self._expand else self._per_head(self._rounded(y), to_values)
        return out, lse if want_lse else None, cache

    def _per_head(self, x: Array, w: Array) -> Array:
        """x [n, N, I] times w [N, O, I], rounded: [n, N, O]."""
        return np.stack([self._rounded(self._product(x[:, n], w[n])) for n in range(len(w))], 1)

    # Ops with a state

    def short_conv(
        self, x: Array, w: Array, bias: Array | None, cache: Any, step: Step, spec: ConvSpec
    ) -> tuple[Array, Any]:
        fields, part = step.state(cache.group), cache.parts["conv"]
        taps, out = self._wide(w), np.zeros(x.shape)
        for number, tokens, _ in rows_of(step):
            slot = int(fields.read[number])
            before = np.zeros_like(part[0]) if slot < 0 else part[slot]
            inputs = self._wide(np.concatenate([before.T, x[tokens]]))
            n = len(inputs) - spec.width + 1
            y = np.zeros((n, spec.channels), self._acc)
            for i in range(spec.width):
                y += taps[:, i] * inputs[i : i + n]
            y = y if bias is None else y + self._wide(bias)
            out[tokens] = self._rounded(y if spec.activation is None else self._activated(y, spec.activation))
        _, cache = self._base.short_conv(x, w, bias, cache, step, spec)
        return out, cache

    def state_scan(
        self,
        q: Array,
        k: Array,
        v: Array,
        a: Array,
        b: Array,
        a_log: Array,
        dt_bias: Array,
        cache: Any,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[Array, Any]:
        fields, out = step.state(cache.group), np.zeros(v.shape)
        if np.any(fields.checkpoint_offset):
            raise PluginError("the emulation stores no checkpoints; give it a step that asks for none")
        repeat = spec.num_v_heads // spec.num_k_heads
        q, k = (np.repeat(self._unit(x, spec.l2_norm_eps), repeat, 1) for x in (q, k))
        q = q * self._acc.type(spec.scale)
        shifted = self._wide(a) + self._wide(dt_bias)
        rate = self._function(np.exp(self._wide(a_log)))
        decay = self._function(np.exp(-rate * self._function(np.logaddexp(self._acc.type(0), shifted))))
        beta = self._activated(self._wide(b), "sigmoid")
        cache = cache.succeed()
        part, found = cache.parts["scan"], []
        for number, tokens, _ in rows_of(step):
            slot = int(fields.read[number])
            S = self._wide(np.zeros_like(part[0]) if slot < 0 else part[slot])
            for t in range(tokens.start, tokens.stop):
                S = S * decay[t, :, None, None]
                key = k[t][:, :, None]
                update = beta[t, :, None] * (self._wide(v[t]) - (key * S).sum(1))
                S = (S + key * update[:, None, :]).astype(self._kept).astype(self._acc)
                out[t] = self._rounded((q[t][:, :, None] * S).sum(1))
            found.append((int(fields.write[number]), S))
        cache.touch([slot for slot, _ in found])
        for slot, S in found:
            part[slot] = S
        return out, cache

    def _unit(self, x: Array, eps: float | None) -> Array:
        x = self._wide(x)
        if eps is None:
            return x
        return np.asarray(x / np.sqrt(np.add.accumulate(x * x, -1)[..., -1:] + self._acc.type(eps)))

    # Experts

    def route(self, logits: Array, spec: RouteSpec, bias: Array | None = None) -> tuple[Array, Array]:
        """Which experts is a matter of the exact scores; their weights are computed in the accumulator."""
        ids, _ = self._base.route(logits, spec, bias)
        x = self._wide(logits)
        if spec.scoring == "softmax_topk":
            x = np.take_along_axis(x, ids, -1)
        if spec.scoring == "sigmoid":
            scores = self._activated(x, "sigmoid")
        else:
            e = self._function(np.exp(x - x.max(-1, keepdims=True)))
            scores = e / np.add.accumulate(e, -1)[..., -1:]
        weights = scores if spec.scoring == "softmax_topk" else np.take_along_axis(scores, ids, -1)
        if spec.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + self._acc.type(1e-20))
        return ids, (weights * self._acc.type(spec.scale)).astype(self._kept).astype(np.float64)

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
        slots = np.asarray(ids) if slot_of_expert is None else np.asarray(slot_of_expert)[ids]
        total = np.zeros(x.shape, self._acc)
        for slot in np.unique(slots[slots >= 0]):
            for j in range(slots.shape[1]):
                mine = np.flatnonzero(slots[:, j] == slot)
                factor, given = self._wide(weights[mine, j, None]), x[mine]
                if spec.weights_on_input:
                    given, factor = self._rounded(self._wide(given) * factor), np.ones((), self._acc)
                b_in = None if packed.gate_up_bias is None else packed.gate_up_bias[slot]
                b_out = None if packed.down_bias is None else packed.down_bias[slot]
                hidden = self._glu(
                    self.linear(given, packed.gate_up[slot], b_in), spec.activation, spec.limit
                )
                y = self.linear(self._rounded(hidden), packed.down[slot], b_out)
                total[mine] += self._wide(y) * factor
        return self._rounded(total)

    # Sums of the composites, which round as the plain ops do.

    def embed_step(self, w: Array, step: Step, scale: float | None = None) -> Array:
        return self._rounded(super().embed_step(w, step, scale))

    def linear_add(self, x: Array, w: Array, h: Array, bias: Array | None = None) -> Array:
        return self._rounded(super().linear_add(x, w, h, bias))

    def linear_norm_add(
        self, x: Array, w: Array, n: Array, h: Array, eps: float, bias: Array | None = None
    ) -> Array:
        return self._rounded(super().linear_norm_add(x, w, n, h, eps, bias))

    def residual_add(self, h: Array, x: Array) -> Array:
        return self._rounded(super().residual_add(h, x))

    def head_logits(
        self, h: Array, n: Array, w: Array, step: Step, eps: float, soft_cap: float | None = None
    ) -> Array:
        logits = super().head_logits(h, n, w, step, eps, None)
        return logits if soft_cap is None else self._capped(self._wide(logits), soft_cap).astype(self._kept)


def rows_of(step: Step) -> list[tuple[int, slice, int]]:
    """Number, tokens and sequence length of each row that is not padding."""
    starts, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    return [(r, slice(starts[r], starts[r + 1]), n) for r, n in enumerate(lengths) if n > 0]


def _visible(step: Step, tokens: slice, length: int, spec: AttentionSpec) -> tuple[Array, Array]:
    """Which keys [n, m] a row's queries see, and the positions [m] from the first to the last of these."""
    mask = seen(length, spec)[step.positions[tokens]]
    at = np.flatnonzero(mask.any(0))
    if len(at):
        at = np.arange(at[0], at[-1] + 1)
    return mask[:, at], at
