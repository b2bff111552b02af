"""The op table: what a model may compute, with shapes, semantics, composites and error budgets.

A backend's table subclasses `Ops` and implements every *plain* op. Each *fused* op is defined here by its
composite of plain ops, which a table inherits until it has something faster; core counts and reports what is
inherited. Arrays are the backend's own. Shapes: T tokens, N query heads, K KV heads, H head size, D model
width, F MLP width, V vocabulary, E experts, C channels. Rows of padding hold finite values and are ignored by
everyone.

Rules for all ops:
- pure: no argument is changed, but caches (taken and returned) and `h` where an op says "may consume h";
- the last dimension of an array may be assumed contiguous, nothing else (slices of a wider product are
  common);
- sums of products, norms and softmax accumulate in float32 or wider; the result has the dtype of the first
  array unless said otherwise;
- `h`, the hidden state between ops, is opaque: models pass it to ops and do no arithmetic on it;
- weights `w` and `n` are what `pack` returned; norm weights, biases and tables may be wider than activations.

Write, then attend: an op that takes a cache first writes this step's entries at `slots` (or advances the
state), then reads, and returns the handle. `step.groups[g]` for the handle's group holds tables and slots.

Budget: `Op.reduces` names the lengths of the sums behind each output element and `Op.roundings` counts
roundings to the activation dtype between input and output; with the unit round-offs of accumulator and dtype
they give the per-element bound (rule A in conformance/tolerance.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from core.contract.batch import Step
from core.contract.errors import PluginError
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
from core.contract.types import Array, CacheHandle, Packed

Kind = Literal["plain", "fused"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """An entry of the table: its name, kind and error budget."""

    name: str
    kind: Kind
    reduces: tuple[str, ...]
    roundings: int


OPS: dict[str, Op] = {}


def _op(kind: Kind, *reduces: str, roundings: int = 1) -> Callable[[F], F]:
    def register(method: F) -> F:
        OPS[method.__name__] = Op(method.__name__, kind, reduces, roundings)
        return method

    return register


class Ops:
    """Base of every backend's table. Plain ops raise `PluginError` until implemented; fused ops are
    composites.
    """

    @_op("plain", roundings=0)
    def select_tokens(self, step: Step) -> Array:
        """Input ids of a step: int32 [T]; `token_ids`, or `last[token_source]` where token_source >= 0."""
        raise _missing(self, "select_tokens")

    @_op("plain", roundings=0)
    def embed(self, w: Packed, ids: Array, first: int = 0) -> Array:
        """Rows of a table: w [V, D], ids [T] -> [T, D]. Ids outside [first, first + V) give zeros (a shard's
        rows).
        """
        raise _missing(self, "embed")

    @_op("plain", roundings=0)
    def take(self, x: Array, rows: Array) -> Array:
        """x [T, ...], rows int32 [n] -> [n, ...]."""
        raise _missing(self, "take")

    @_op("plain", "D")
    def linear(self, x: Array, w: Packed, bias: Packed | None = None, *, wide: bool = False) -> Array:
        """x [..., D] @ w [O, D].T + bias [O] -> [..., O]; float32 (or wider) result where `wide`."""
        raise _missing(self, "linear")

    @_op("plain", "D")
    def norm(self, x: Array, n: Packed | None, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * n over the last dimension, [..., D]; n [D], None = ones (Zhang &
        Sennrich, 2019).

        In float32 or wider up to the one rounding at the end.
        """
        raise _missing(self, "norm")

    @_op("plain")
    def rope(self, x: Array, rope: Rope, step: Step) -> Array:
        """Rotate x [T, N, H] by the angles of `step.positions` (Su et al., RoFormer, 2021).

        Of the first `rotary_size` elements, pair (a, b) becomes (a cos - b sin, b cos + a sin); the rest
        passes through.
        """
        raise _missing(self, "rope")

    @_op("plain")
    def glu(self, x: Array, activation: Activation) -> Array:
        """[..., 2F] -> [..., F]: activation(x[..., :F]) * x[..., F:].

        silu(a) = a / (1 + e^-a); gelu exact by erf, gelu_tanh by its tanh form; swigluoai: (up + 1) * gate *
        sigmoid(1.702 * gate) with gate = min(a, 7) and up clamped to [-7, 7].
        """
        raise _missing(self, "glu")

    @_op("plain")
    def gate(self, x: Array, g: Array, activation: Activation) -> Array:
        """x * activation(g); g has x's shape, or 1 as its last dimension."""
        raise _missing(self, "gate")

    @_op("plain")
    def soft_cap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""
        raise _missing(self, "soft_cap")

    @_op("plain", "H", "S", roundings=2)
    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: CacheHandle,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, CacheHandle]:
        """Write k [T, K, H] and v [T, K, Hv] at `slots`, then attend with q [T, N, H] -> (out [T, N, Hv],
        lse, cache).

        Query head n reads KV head n // (N / K). The query at position p of row r sees keys j of its row with
        j <= p (causal), p - j < window, j // chunk == p // chunk; score = scale * q . k, soft-capped where
        asked; softmax over them, plus exp(sinks[n]) in the denominator. A query that sees no key gives 0 and
        lse -inf, sinks or not. `k` and `v` None: nothing is written; the cache is another layer's. lse
        float32 [T, N], natural logarithm, sinks included.
        """
        raise _missing(self, "attend")

    @_op("plain", "H", "S", roundings=3)
    def attend_latent(
        self,
        q_nope: Array,
        q_rope: Array,
        latent: Array | None,
        k_rope: Array | None,
        w_k: Packed,
        w_v: Packed,
        cache: CacheHandle,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, CacheHandle]:
        """Multi-head latent attention (DeepSeek-V2, 2024), causal.

        Writes latent [T, C] and k_rope [T, P] at `slots`. q_nope [T, N, Hn], q_rope [T, N, P]; w_k [N, Hn, C]
        and w_v [N, Hv, C] are stored [N * Hn, C] and [N * Hv, C]. With keys c_j, r_j of the row up to p:
        score_j = scale * (q_nope . (w_k c_j) + q_rope . r_j); out = w_v (sum_j softmax_j c_j) -> [T, N, Hv].
        Multiplying q by w_k first ("absorbed") or expanding keys first is the backend's choice.
        """
        raise _missing(self, "attend_latent")

    @_op("plain", "W")
    def short_conv(
        self, x: Array, w: Packed, bias: Packed | None, cache: CacheHandle, step: Step, spec: ConvSpec
    ) -> tuple[Array, CacheHandle]:
        """Causal depthwise convolution over each row's tokens: x [T, C], w [C, W] -> ([T, C], cache).

        y_t = activation(bias + sum_i w[:, i] * x_{t - W + 1 + i}); inputs before the row's first token of
        this step come from the state part "conv" [C, W - 1] (oldest first), zeros at a row's beginning.
        """
        raise _missing(self, "short_conv")

    @_op("plain", "S", "H", roundings=2)
    def state_scan(
        self,
        q: Array,
        k: Array,
        v: Array,
        a: Array,
        b: Array,
        a_log: Packed,
        dt_bias: Packed,
        cache: CacheHandle,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[Array, CacheHandle]:
        """Gated delta rule over each row's tokens (Yang et al., 2024), state part "scan" S [N, Hk, Hv] in
        float32.

        q, k [T, K, Hk], v [T, N, Hv], a, b [T, N], a_log, dt_bias [N]; head n reads k head n // (N / K). q
        and k are L2-normalised where the spec says, q is scaled. With decay g = -exp(a_log) * softplus(a +
        dt_bias) and beta = sigmoid(b), per head and token: S *= exp(g); S += k (beta * (v - k S))^T; out = q
        S -> [T, N, Hv].
        """
        raise _missing(self, "state_scan")

    @_op("plain", "E", roundings=0)
    def route(self, logits: Array, spec: RouteSpec, bias: Packed | None = None) -> tuple[Array, Array]:
        """Router logits [T, E] -> (ids int32 [T, top_k], weights float32 [T, top_k]); order and rules in
        `RouteSpec`.
        """
        raise _missing(self, "route")

    @_op("plain", "D", "F", "top_k", roundings=3)
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
        """Sum over each token's experts of weight * down(glu(gate_up(x))): x [T, D] -> [T, D].

        `slot_of_expert` int32 [E]: where an expert lies in `packed` (None = at its id; -1 = not on this rank,
        adds 0). `tokens_per_rank` is for expert parallelism: int32 [world_size], None = every rank holds all
        tokens.
        """
        raise _missing(self, "experts")

    @_op("fused")
    def embed_step(self, w: Packed, step: Step, scale: float | None = None) -> Array:
        """Hidden state of a step's input tokens: [T, D], times `scale`, which the compute dtype holds."""
        h = self.embed(w, self.select_tokens(step))
        return h if scale is None else h * scale

    @_op("fused", "D", "D", roundings=2)
    def norm_linear(self, h: Array, n: Packed, w: Packed, eps: float, bias: Packed | None = None) -> Array:
        """linear(norm(h)): h [T, D] -> [T, O]."""
        return self.linear(self.norm(h, n, eps), w, bias)

    @_op("fused", "D", roundings=2)
    def linear_add(self, x: Array, w: Packed, h: Array, bias: Packed | None = None) -> Array:
        """h + linear(x): x [T, O], h [T, D] -> [T, D]. May consume h."""
        return h + self.linear(x, w, bias)

    @_op("fused", "D", "D", roundings=3)
    def norm_linear_glu(self, h: Array, n: Packed, w: Packed, eps: float, activation: Activation) -> Array:
        """glu(linear(norm(h))): h [T, D], w [2F, D] -> [T, F]."""
        return self.glu(self.linear(self.norm(h, n, eps), w), activation)

    @_op("fused", "D", "D", roundings=3)
    def linear_norm_add(
        self, x: Array, w: Packed, n: Packed, h: Array, eps: float, bias: Packed | None = None
    ) -> Array:
        """h + norm(linear(x)): families that norm after the product. May consume h."""
        return h + self.norm(self.linear(x, w, bias), n, eps)

    @_op("fused")
    def residual_add(self, h: Array, x: Array) -> Array:
        """h + x. May consume h."""
        return h + x

    @_op("fused", "D", roundings=2)
    def norm_gate(self, x: Array, n: Packed, g: Array, eps: float, activation: Activation) -> Array:
        """norm(x) * activation(g), over the last dimension."""
        return self.gate(self.norm(x, n, eps), g, activation)

    @_op("fused", "H", "S", roundings=4)
    def norm_rope_attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        qn: Packed | None,
        kn: Packed | None,
        eps: float,
        rope: Rope | None,
        cache: CacheHandle,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
    ) -> tuple[Array, CacheHandle]:
        """attend(rope(norm(q)), rope(norm(k)), v): norms over each head where qn, kn [H] are given; rope None
        = none.
        """
        if qn is not None:
            q = self.norm(q, qn, eps)
        if kn is not None:
            k = self.norm(k, kn, eps)
        if rope is not None:
            q, k = self.rope(q, rope, step), self.rope(k, rope, step)
        out, _, cache = self.attend(q, k, v, cache, step, spec, sinks)
        return out, cache

    @_op("fused", "H", "S", roundings=5)
    def norm_rope_attend_latent(
        self,
        q: Array,
        kv: Array,
        kvn: Packed,
        eps: float,
        rope: Rope,
        w_k: Packed,
        w_v: Packed,
        cache: CacheHandle,
        step: Step,
        spec: LatentSpec,
    ) -> tuple[Array, CacheHandle]:
        """Latent attention from the projections: q [T, N, Hn + P], kv [T, C + P] -> (out [T, N, Hv], cache).

        The first C elements of kv are normed (kvn [C]); the last P of q's heads and of kv are rotated.
        """
        q_nope, q_rope = q[:, :, : spec.nope_size], q[:, :, spec.nope_size :]
        latent = self.norm(kv[:, : spec.latent_size], kvn, eps)
        k_rope = kv[:, spec.latent_size :].reshape(-1, 1, spec.rope_size)
        q_rope, k_rope = self.rope(q_rope, rope, step), self.rope(k_rope, rope, step)
        k_rope = k_rope.reshape(-1, spec.rope_size)
        out, _, cache = self.attend_latent(q_nope, q_rope, latent, k_rope, w_k, w_v, cache, step, spec)
        return out, cache

    @_op("fused", "D", "D", roundings=1)
    def head_logits(
        self, h: Array, n: Packed, w: Packed, step: Step, eps: float, soft_cap: float | None = None
    ) -> Array:
        """Logits to sample from: norm and product of the rows `sample_rows` of h [T, D] -> float32 [R, V].

        All tokens' rows, [T, V], where `Outputs.all_logits`.
        """
        if not step.bucket.outputs.all_logits:
            h = self.take(h, step.sample_rows)
        logits = self.linear(self.norm(h, n, eps), w, wide=True)
        return logits if soft_cap is None else self.soft_cap(logits, soft_cap)


PLAIN_OPS = frozenset(name for name, op in OPS.items() if op.kind == "plain")
FUSED_OPS = frozenset(OPS) - PLAIN_OPS


def _missing(table: Ops, name: str) -> PluginError:
    return PluginError(
        f"{type(table).__module__}.{type(table).__name__} does not implement the plain op {name!r}; "
        "implement it, or do not declare the capability that needs it"
    )


def inherited_ops(table: Ops) -> tuple[str, ...]:
    """Names of the ops that `table` takes from `Ops`: composites in use, and plain ops that it lacks."""
    return tuple(sorted(name for name in OPS if getattr(type(table), name) is getattr(Ops, name)))
