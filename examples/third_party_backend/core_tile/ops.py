"""The op table of backend `tile`: plain ops in float32. Fused ops are core's composites of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.batch import Step
from core.contract.errors import UnsupportedError
from core.contract.ops import Ops
from core.contract.opspecs import Activation, AttentionSpec, Rope
from core.contract.spec import check_capabilities
from core_tile import attention
from core_tile.allocator import Cache
from core_tile.plugin import SPEC

Array = npt.NDArray[Any]


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, np.float32(1), e) / (1 + e)


def _erf(x: Array) -> Array:
    """By the series near 0 and the continued fraction beyond (Abramowitz and Stegun, 7.1.5 and 7.1.14)."""
    x = x.astype(np.float64)
    small = np.clip(x, -2.5, 2.5)
    term = total = small
    for n in range(1, 60):
        term = -term * small * small / n
        total = total + term / (2 * n + 1)
    large = np.maximum(np.abs(x), 2.5)
    fraction = large
    for n in range(60, 0, -1):
        fraction = large + (n / 2) / fraction
    tail = 1 - np.exp(-large * large) / (fraction * np.sqrt(np.pi))
    found = np.where(np.abs(x) <= 2.5, 2 / np.sqrt(np.pi) * total, np.sign(x) * tail)
    return found.astype(np.float32)


def activate(x: Array, activation: Activation) -> Array:
    """An activation of one argument, element by element."""
    if activation == "silu":
        return x * _sigmoid(x)
    if activation == "sigmoid":
        return _sigmoid(x)
    if activation == "gelu":
        return np.float32(0.5) * x * (1 + _erf(x * np.float32(0.5**0.5)))
    if activation == "gelu_tanh":
        inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
    raise UnsupportedError(f"activation {activation!r} takes two arguments; it works in glu only")


class Table(Ops):
    """See `core.contract.ops.Ops`."""

    def select_tokens(self, step: Step) -> Array:
        """Ids of the step's tokens: their own, or `last` of a slot."""
        source = step.token_source
        return np.where(source >= 0, step.last[np.maximum(source, 0)], step.token_ids)

    def embed(self, w: Array, ids: Array, first: int = 0) -> Array:
        """Rows of a table; 0 for ids that another rank holds."""
        inside = (ids >= first) & (ids < first + len(w))
        return np.where(inside[:, None], w[np.where(inside, ids - first, 0)], np.float32(0))

    def take(self, x: Array, rows: Array) -> Array:
        """Rows of an array."""
        return x[rows]

    def linear(self, x: Array, w: Array, bias: Array | None = None, *, wide: bool = False) -> Array:
        """x w^T + bias."""
        y = np.ascontiguousarray(x) @ w.T
        return y if bias is None else y + bias

    def norm(self, x: Array, n: Array | None, eps: float) -> Array:
        """RMS norm."""
        y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps))
        return y if n is None else y * n

    def rope(self, x: Array, rope: Rope, step: Step) -> Array:
        """Rotary embedding of the first `rotary_size` elements."""
        size, half = rope.spec.rotary_size, rope.spec.rotary_size // 2
        angles = rope.table[step.positions][:, None, :]
        cos, sin = angles[..., :half], angles[..., half:]
        pairs = slice(half), slice(half, size)
        if rope.spec.interleaved:
            pairs = slice(0, size, 2), slice(1, size, 2)
        y = x.copy()
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        y[..., pairs[0]], y[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
        return y

    def glu(self, x: Array, activation: Activation) -> Array:
        """activation(first half) * second half."""
        F = x.shape[-1] // 2
        a, up = x[..., :F], x[..., F:]
        if activation != "swigluoai":
            return activate(a, activation) * up
        a, up = np.minimum(a, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
        return (up + 1) * a * _sigmoid(np.float32(1.702) * a)

    def gate(self, x: Array, g: Array, activation: Activation) -> Array:
        """x * activation(g)."""
        return x * activate(g, activation)

    def soft_cap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""
        return np.float32(cap) * np.tanh(x / np.float32(cap))

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
        """Write, then attend."""
        check_capabilities(SPEC, spec)
        if k is not None and v is not None:
            attention.write(cache, step, k, v)
        out, lse = attention.attend(q, cache, step, spec)
        return out, lse if want_lse else None, cache

    def route(self, logits: Any, spec: Any, bias: Any = None) -> Any:
        """Not declared."""
        raise UnsupportedError("backend 'tile' has no routed experts; choose another backend")
