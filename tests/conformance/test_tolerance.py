"""Bounds of rule A: correct arithmetic stays inside, and the faults that they exist for do not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from conformance.tolerance import (
    UNIT_ROUNDOFF,
    Precision,
    Scores,
    attention_error,
    gamma,
    gamma_prob,
    linear_error,
    lse_error,
    norm_error,
    reduction_error,
    worst,
)

F32 = Precision(out="float32")


def rounded(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that float32 holds exactly, as float64."""
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def test_gamma_bounds_a_plain_sum_of_equal_terms() -> None:
    u = UNIT_ROUNDOFF["float32"]
    terms = np.float32(0.1) * np.ones(4096, np.float32)
    total = np.float32(0)
    for term in terms:
        total += term
    exact = Fraction(float(terms[0])) * 4096
    error = abs(float(Fraction(float(total)) - exact)) / float(exact)
    assert 0 < error <= gamma(4096, u)


def test_gamma_has_no_value_where_everything_may_be_lost() -> None:
    with pytest.raises(ValueError, match="sum in blocks"):
        gamma(256, UNIT_ROUNDOFF["bfloat16"])


def test_the_probabilistic_bound_grows_with_the_root_of_the_length() -> None:
    u = UNIT_ROUNDOFF["float32"]
    assert gamma_prob(40000, u) / gamma_prob(10000, u) == pytest.approx(2, rel=1e-3)
    assert gamma_prob(10000, u) == pytest.approx(800 * u, rel=1e-3)
    assert gamma_prob(10000, u, lam=4) == pytest.approx(400 * u, rel=1e-3)


def test_the_smaller_of_both_bounds_is_used() -> None:
    assert F32.sums(16) == gamma(16, F32.u_acc)
    assert F32.sums(4096) == gamma_prob(4096, F32.u_acc)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_float32_product_is_inside_and_a_bfloat16_accumulator_is_not(size: int) -> None:
    import ml_dtypes

    rng = np.random.default_rng(size)
    x, w = rounded(rng, 5, size), rounded(rng, 9, size)
    y = x @ w.T
    bound = linear_error(x, w, y, F32)
    assert worst(x.astype(np.float32) @ w.T.astype(np.float32), y, bound) <= 1
    narrow = np.zeros((5, 9), ml_dtypes.bfloat16)
    for d in range(size):
        narrow = (narrow + (x[:, d, None] * w[None, :, d]).astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert worst(narrow.astype(np.float64), y, bound) > 10


def test_an_input_error_is_passed_on_by_the_size_of_the_weights() -> None:
    rng = np.random.default_rng(1)
    x, w = rounded(rng, 3, 8), rounded(rng, 4, 8)
    off = 1e-3 * rng.choice([-1.0, 1.0], size=x.shape)
    bound = linear_error(x, w, x @ w.T, F32, x_error=1e-3)
    assert worst((x + off) @ w.T, x @ w.T, bound) <= 1
    assert worst((x + 20 * off) @ w.T, x @ w.T, bound) > 1


def test_a_float32_norm_is_inside_and_a_forgotten_eps_is_not() -> None:
    rng = np.random.default_rng(2)
    x, n, eps = rounded(rng, 6, 96), rounded(rng, 96), 1e-3
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * n
    bound = norm_error(x, n, y, eps, F32)
    x32, n32 = x.astype(np.float32), n.astype(np.float32)
    rms = np.sqrt((x32 * x32).mean(-1, keepdims=True) + np.float32(eps))
    assert worst(x32 / rms * n32, y, bound) <= 1
    assert worst(x / np.sqrt((x * x).mean(-1, keepdims=True)) * n, y, bound) > 10


def attention(dtype: type, length: int, skip: int = 0) -> tuple[np.ndarray, float, Scores, np.ndarray]:
    """One query in `dtype`; `skip` keys are left out of the sum, but not of what is expected."""
    rng = np.random.default_rng(length)
    H = 64
    q, k, v = rounded(rng, H), rounded(rng, length, H), rounded(rng, length, H)
    scale = H**-0.5
    scores = scale * (k @ q)
    e = np.exp(scores - scores.max())
    s = Scores(scores, scale * (np.abs(k) @ np.abs(q)), e / e.sum(), H)
    qd, kd, vd = q.astype(dtype), k[skip:].astype(dtype), v[skip:].astype(dtype)
    found = dtype(scale) * (kd @ qd)
    p = np.exp(found - found.max())
    out = (p / p.sum()) @ vd
    return out, float(found.max() + np.log(p.sum())), s, v


@pytest.mark.parametrize("length", [1, 17, 700])
def test_float32_attention_is_inside_and_a_missing_key_is_not(length: int) -> None:
    out, lse, s, v = attention(np.float32, length)
    exact, exact_lse, _, _ = attention(np.float64, length)
    bound = attention_error(s, v, exact, F32)
    assert worst(out, exact, bound) <= 1
    assert abs(lse - exact_lse) <= lse_error(s, exact_lse, F32)
    if length > 1:
        wrong, wrong_lse, _, _ = attention(np.float64, length, skip=1)
        assert worst(wrong, exact, bound) > 10
        assert abs(wrong_lse - exact_lse) > lse_error(s, exact_lse, F32)


def test_a_sum_over_ranks_is_charged_for_its_wire_format() -> None:
    rng = np.random.default_rng(3)
    parts = rounded(rng, 8, 100)
    total = np.zeros(100, np.float32)
    for part in parts.astype(np.float32):
        total += part
    assert worst(total, parts.sum(0), reduction_error(parts, F32)) <= 1
    assert worst(parts[:7].sum(0), parts.sum(0), reduction_error(parts, F32)) > 10


def test_what_is_not_finite_is_never_inside() -> None:
    assert worst([np.nan], [1.0], [10.0]) == np.inf
    assert worst([np.inf], [1.0], [10.0]) == np.inf
    assert worst([-np.inf], [-np.inf], [10.0]) == 0
    assert worst([], [], []) == 0
