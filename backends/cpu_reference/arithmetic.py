"""The arithmetic behind the ops: float64 in, float64 out.

Each function treats every row (the last dimension) by itself and in the same way: sums are taken row by row,
by calls of the same shape, and the rest is element by element. So a row's bits depend on that row alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import UnsupportedError
from core.contract.opspecs import Activation, RopeSpec

Array = npt.NDArray[Any]

GLU_LIMIT = 7.0
"""Clamp of "swigluoai" in the op `glu`."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def wide(x: Any) -> Array:
    """Contiguous float64. NumPy may take another path, with other bits, through memory with gaps."""
    return np.ascontiguousarray(x, np.float64)


def product(x: Any, w: Any, bias: Any | None = None) -> Array:
    """x [..., D], w [O, D], bias [O] -> x w^T + bias, [..., O].

    Row by row: one call for all rows would sum in an order that depends on their number.
    """
    rows = wide(x).reshape(-1, x.shape[-1])
    w = wide(w)
    y = np.empty((len(rows), len(w)))
    for i, row in enumerate(rows):
        y[i] = w @ row
    if bias is not None:
        y = y + wide(bias)
    return y.reshape(*x.shape[:-1], len(w))


def rms_norm(x: Any, n: Any | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * n over the last dimension."""
    rows = wide(x).reshape(-1, x.shape[-1])
    mean = np.array([row @ row for row in rows]) / x.shape[-1]
    y = rows / np.sqrt(mean + eps)[:, None]
    if n is not None:
        y = y * wide(n)
    return y.reshape(x.shape)


def rotate(x: Any, table: Any, positions: Any, spec: RopeSpec) -> Array:
    """Rotary embedding of x [T, N, H] by the table's rows at `positions` [T]."""
    y = wide(x).copy()
    half = spec.rotary_size // 2
    angles = wide(table[positions])[:, None, :]  # [T, 1, rotary_size]
    cos, sin = angles[..., :half], angles[..., half:]
    if spec.interleaved:
        first, second = slice(0, spec.rotary_size, 2), slice(1, spec.rotary_size, 2)
    else:
        first, second = slice(0, half), slice(half, spec.rotary_size)
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return y


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), written so that e never overflows."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def softplus(x: Array) -> Array:
    """log(1 + e^x)."""
    return np.logaddexp(0.0, x)


def activate(x: Array, activation: Activation) -> Array:
    """An activation of one argument.

    Raises:
        UnsupportedError: "swigluoai", which takes two.
    """
    if activation == "silu":
        return x * sigmoid(x)
    if activation == "sigmoid":
        return sigmoid(x)
    if activation == "gelu":
        return 0.5 * x * (1.0 + _erf(x * math.sqrt(0.5)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    raise UnsupportedError(
        f"activation {activation!r} takes a gate and an up part, so it works in glu and experts only; "
        "use another one here"
    )


def glu(x: Any, activation: Activation, limit: float | None = GLU_LIMIT) -> Array:
    """[..., 2F] -> [..., F]: activation(first half) * second half. `limit` is for "swigluoai"."""
    size = x.shape[-1] // 2
    a, up = wide(x[..., :size]), wide(x[..., size:])
    if activation != "swigluoai":
        return activate(a, activation) * up
    if limit is not None:
        a, up = np.minimum(a, limit), np.clip(up, -limit, limit)
    return (up + 1.0) * a * sigmoid(1.702 * a)


def capped(x: Any, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return cap * np.tanh(wide(x) / cap)


def softmax(x: Array) -> Array:
    """Softmax of a vector [n]."""
    e = np.exp(x - x.max())
    return e / e.sum()
