"""How far a correct result may lie from the exact one: rule A, the theoretical envelope.

Every bound is per element, comes from the rounding errors that the op's arithmetic must make, and is scaled
by absolute values of the data, never by the result alone. The exact value y is computed in float64 from the
same rounded inputs, so the rounding of inputs is charged to nobody.

Derivation. A rounding to a format with unit round-off u changes a value by a factor 1 + d, |d| <= u
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 2). A sum of n products passes each
term through at most n such factors in any order of summation, so its error is at most gamma(n, u) times the
sum of the terms' absolute values (chapter 3). For rounding errors that are independent and of mean zero the
factor is gamma_prob(n, u), which grows with sqrt(n), with a probability of failure below 2 n exp(-lambda^2
(1 - u)^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). Either holds,
so the smaller is used. What follows a sum (a division, a square root, an exponential) adds its own few u.

Inputs that are themselves results carry an error; functions take it as an absolute error per element and pass
it on to first order. Products of two rounding errors are of the order u^2 and covered by the slack of lambda.

Arrays are float64; absolute errors have the shape of what they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Error = Array | float
"""An absolute error bound per element; 0.0 = exact."""

UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3": 2.0**-4,
    "float8_e5m2": 2.0**-3,
}
"""Largest relative error of rounding to nearest, by dtype."""

SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float8_e4m3": 2.0**-6,
    "float8_e5m2": 2.0**-14,
}
"""Below it results lose bits, or are flushed to zero; so every bound has this much added."""


@dataclass(frozen=True)
class Precision:
    """What a backend declares about its arithmetic.

    Attributes:
        out: dtype of results. accumulator: dtype of sums.
        probability: dtype of attention's weights where they meet the values; "" = the accumulator's.
        exp: error of exp, log, tanh and the like, in units of the accumulator's round-off.
    """

    out: str
    accumulator: str = "float32"
    probability: str = ""
    exp: float = 8.0

    @property
    def u_out(self) -> float:
        """Unit round-off of results."""
        return UNIT_ROUNDOFF[self.out]

    @property
    def u_acc(self) -> float:
        """Unit round-off of sums."""
        return UNIT_ROUNDOFF[self.accumulator]

    @property
    def u_p(self) -> float:
        """Round-off of attention's weights; a format as wide as the sums' costs no rounding of its own."""
        u = UNIT_ROUNDOFF[self.probability or self.accumulator]
        return max(u, self.u_acc)

    @property
    def u_wide(self) -> float:
        """Unit round-off of what is kept in float32 at least: log-sum-exp, routing weights, states."""
        return min(self.u_out, UNIT_ROUNDOFF["float32"])

    @property
    def tiny(self) -> float:
        """Absolute error that any result may have."""
        return SMALLEST_NORMAL[self.out]

    def sums(self, n: int) -> float:
        """The factor for a sum of n products."""
        return min(gamma(n, self.u_acc), gamma_prob(n, self.u_acc))


def gamma(n: int, u: float) -> float:
    """n u / (1 - n u): the worst case of n roundings in a row.

    Raises:
        ValueError: n u is 1 or more, where nothing can be said.
    """
    if n * u >= 1:
        raise ValueError(
            f"gamma({n}, {u}) has no value, since {n} roundings may lose everything; sum in blocks"
        )
    return n * u / (1 - n * u)


def gamma_prob(n: int, u: float, lam: float = 8.0) -> float:
    """exp(lam sqrt(n) u + n u^2 / (1 - u)) - 1, exceeded with a chance of at most 2 n exp(-lam^2 / 2)."""
    return float(np.expm1(lam * np.sqrt(n) * u + n * u * u / (1 - u)))


def linear_error(x: Array, w: Array, y: Array, p: Precision, x_error: Error = 0.0) -> Array:
    """y = x w^T, x [..., D], w [O, D], y [..., O] (with its bias, whose one addition is part of the sum)."""
    sums = p.sums(x.shape[-1] + 1)
    size = np.abs(x) @ np.abs(w).T + np.abs(y)
    carried = np.broadcast_to(x_error, x.shape) @ np.abs(w).T
    return np.asarray(sums * size + carried + p.u_out * np.abs(y) + p.tiny)


def norm_error(x: Array, n: Array, y: Array, eps: float, p: Precision, x_error: Error = 0.0) -> Array:
    """y = x / rms(x) n over the last dimension.

    The sum of squares is halved by the square root; division, root and product round three times.
    """
    own = p.sums(x.shape[-1]) / 2 + 3 * p.u_acc + p.u_out
    squares = (x * x).sum(-1, keepdims=True) + x.shape[-1] * eps
    x_error = np.broadcast_to(x_error, x.shape)
    carried = np.abs(n) * x_error * np.sqrt(x.shape[-1] / squares)
    carried = carried + np.abs(y) * (np.abs(x) * x_error).sum(-1, keepdims=True) / squares
    return np.asarray(own * np.abs(y) + carried + p.tiny)


def rotation_error(x: Array, y: Array, half: int, p: Precision, x_error: Error = 0.0) -> Array:
    """y = x rotated in pairs: two products and a sum, with factors of at most 1.

    Whatever the pairing, an element's partner is one of the row's others, so the row's largest stands for it.
    """
    if not half:
        return np.asarray(np.broadcast_to(x_error, x.shape) + 0.0)
    largest = np.abs(x).max(-1, keepdims=True) * np.ones_like(x)
    partner = np.broadcast_to(x_error, x.shape).max(-1, keepdims=True)
    return np.asarray(4 * p.u_acc * largest + 2 * partner + p.u_out * np.abs(y) + p.tiny)


def activation_error(x: Array, p: Precision, x_error: Error = 0.0) -> Array:
    """silu, gelu (both), sigmoid times x or 1: error of activation(x), before any rounding of the result.

    Each is x (or 1) times a factor in [0, 1] made by a function with `exp` roundings of an argument that is
    at most 2 |x|, correct to 4 roundings; slopes are below 1.13. Where the factor is a difference (gelu's
    1 + erf) the error is relative to 1, so it is charged to |x| and not to the result.
    """
    own = (p.exp + 4 + 4 * np.minimum(np.abs(x), 4.0)) * p.u_acc * np.maximum(np.abs(x), 1.0)
    return np.asarray(own + 1.13 * np.broadcast_to(x_error, x.shape))


def product_error(a: Array, b: Array, p: Precision, a_error: Error = 0.0, b_error: Error = 0.0) -> Array:
    """y = a b, element by element."""
    carried = np.abs(a) * b_error + np.abs(b) * a_error
    return np.asarray((p.u_acc + p.u_out) * np.abs(a * b) + carried + p.tiny)


def sum_error(a: Array, b: Array, p: Precision, a_error: Error = 0.0, b_error: Error = 0.0) -> Array:
    """y = a + b, element by element."""
    return np.asarray((p.u_acc + p.u_out) * np.abs(a + b) + a_error + b_error + p.tiny)


@dataclass(frozen=True)
class Scores:
    """One query of one head: exact scores [n] of its keys, and what the bounds need besides.

    Attributes:
        sizes: scale * |q| . |k| for each key, [n]. weights: softmax of the scores (and sink), [n].
        head_size: length of the sums. error: error of the scores that q and k bring with them.
        soft_cap: as in AttentionSpec; its slope is at most 1, and its tanh is relative to the cap.
    """

    scores: Array
    sizes: Array
    weights: Array
    head_size: int
    error: float = 0.0
    soft_cap: float | None = None

    def delta(self, p: Precision) -> float:
        """Largest absolute error of a score."""
        own = (p.sums(self.head_size) + 2 * p.u_acc) * float(self.sizes.max())
        own += p.u_acc * float(np.abs(self.scores).max())
        if self.soft_cap is not None:
            own += p.exp * p.u_acc * self.soft_cap
        return own + self.error


def attention_error(s: Scores, values: Array, out: Array, p: Precision, values_error: Error = 0.0) -> Array:
    """out [Hv] = weights [n] . values [n, Hv].

    A shift of all scores by at most d changes each weight by a factor of at most exp(2 d).
    """
    n = len(s.weights) + 1
    factor = float(np.expm1(2 * s.delta(p))) + 2 * p.exp * p.u_acc + 2 * p.sums(n) + p.u_p
    carried = s.weights @ np.broadcast_to(values_error, values.shape)
    return np.asarray(factor * (s.weights @ np.abs(values)) + carried + p.u_out * np.abs(out) + p.tiny)


def lse_error(s: Scores, lse: float, p: Precision, splits: int = 1) -> float:
    """lse = log(sum exp(scores)); merging parts that were computed apart adds two roundings per halving."""
    n = len(s.weights) + 1
    merge = 2 * float(np.log2(max(splits, 1))) * p.u_acc
    own = float(np.log1p(p.sums(n))) + (2 * p.exp + abs(lse)) * p.u_acc + p.u_wide * abs(lse)
    return s.delta(p) + own + merge


def reduction_error(parts: Array, p: Precision) -> Array:
    """y = sum over ranks of parts [R, ...], each partial sum rounded to the format of the wire (`out`)."""
    total = np.abs(parts).sum(0)
    steps = gamma(max(len(parts) - 1, 0), p.u_out)
    return np.asarray(steps * total + p.u_out * np.abs(parts.sum(0)) + p.tiny)


KAPPA, KAPPA_WILD, ROOT_MEAN = 2.0, 3.0, 1.25
"""Rule B: how many times the emulation's largest error (with soft caps or sinks), and its RMS error."""


@dataclass(frozen=True)
class Comparison:
    """Rule B over a whole tensor: ratios to its two bounds; at most 1 where it holds.

    Attributes:
        largest: of the largest error. mean: of the root of the mean square.
    """

    largest: float
    mean: float


def compared(
    found: Array, exact: Array, emulated: Sequence[Array], out: str, kappa: float = KAPPA
) -> Comparison:
    """Rule B: found against the worst of some emulations, all of one shape.

    Adding and taking off 0.3 in the format of the result shows what a last rounding may do where the
    emulation is exact by luck; nothing can be asked to have less than a rounding's RMS error.
    """
    import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)

    kind = np.dtype(out)
    rounded = exact.astype(kind)
    shifted = (rounded + kind.type(0.3)).astype(kind) - kind.type(0.3)
    step = float(np.abs(shifted.astype(np.float64) - exact).max(initial=0.0))
    largest = max(float(np.abs(e - exact).max(initial=0.0)) for e in emulated)
    least = _root_mean(rounded.astype(np.float64) - exact)
    mean = max(least, *(_root_mean(e - exact) for e in emulated))
    error = np.abs(found - exact)
    if not np.isfinite(error).all():
        return Comparison(np.inf, np.inf)
    tiny = SMALLEST_NORMAL[out]
    return Comparison(
        float(error.max(initial=0.0)) / (kappa * largest + 2 * step + tiny),
        _root_mean(error) / (ROOT_MEAN * mean + tiny),
    )


def _root_mean(x: Array) -> float:
    return float(np.sqrt((x * x).mean())) if x.size else 0.0


def worst(found: Any, wanted: Any, bound: Any) -> float:
    """Largest |found - wanted| / bound; at most 1 where the rule holds, infinite where a value is not finite.

    Equal infinities count as equal.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    same = found == wanted
    with np.errstate(invalid="ignore"):
        ratio = np.abs(found - wanted) / np.asarray(bound, np.float64)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    return float(np.where(same, 0.0, ratio).max(initial=0.0))
