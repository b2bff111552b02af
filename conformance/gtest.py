"""The likelihood-ratio test of draws, and the exact distribution that they are held against.

Exact: a case gives integer weights, so that its probabilities are fractions and every cut is decided by whole
numbers. Nothing here is shared with the samplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import mpmath
import numpy as np
import numpy.typing as npt

from core.sampling.params import SamplingParams

ALPHA = 1e-6
"""Draws that are right have a p-value below this once in a million tests."""
MIN_EXPECTED = 5.0
"""Cells that expect fewer draws are pooled: in them G is not distributed as chi-squared."""
MARGIN = Fraction(1, 10**5)
"""How far a cut must lie from a probability that is not exactly on it."""


def g_test(counts: npt.NDArray[np.int64], probabilities: Sequence[Fraction]) -> float:
    """The probability of draws at least this far from the distribution, if they are drawn from it.

    G = 2 sum(count log(count / expected)), chi-squared with one degree of freedom less than there are cells
    (Wilks, 1938). 0 where a cell that cannot be drawn was drawn; 1 where there is only one cell.

    Args:
        counts: int64 [V]: how often each id was drawn.
        probabilities: [V], in sum 1.
    """
    if len(counts) != len(probabilities) or sum(probabilities) != 1:
        raise ValueError(f"{len(counts)} counts and {len(probabilities)} probabilities, or these are not 1")
    if any(count and not p for count, p in zip(counts.tolist(), probabilities, strict=True)):
        return 0.0
    expected = np.array([float(p) for p in probabilities]) * counts.sum()
    found, wanted = _pooled(counts[expected > 0], expected[expected > 0])
    drawn = found > 0
    g = 2 * float(np.sum(found[drawn] * np.log(found[drawn] / wanted[drawn])))
    freedom = len(found) - 1
    return 1.0 if freedom == 0 else float(mpmath.gammainc(freedom / 2, max(g, 0) / 2, regularized=True))


def _pooled(
    counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The cells, rarest first, those of too small an expectation together with as many more as it takes."""
    order = np.argsort(expected)
    found, wanted = counts[order].astype(np.float64), expected[order]
    rare = int((wanted < MIN_EXPECTED).sum())
    if not rare:
        return found, wanted
    while wanted[:rare].sum() < MIN_EXPECTED and rare < len(wanted):
        rare += 1
    return np.append(found[rare:], found[:rare].sum()), np.append(wanted[rare:], wanted[:rare].sum())


def exact(weights: Sequence[int], params: SamplingParams) -> list[Fraction]:
    """Probabilities of ids whose weights (exp(logit / temperature), biases included) are whole numbers, by
    the steps that docs/sampling.md gives.

    Raises:
        ValueError: a cut lies so near to a probability that rounding would decide; only one between equal
            weights may lie on it, because sums of equal numbers are exact.
    """
    left = {i: w for i, w in enumerate(weights) if w}
    if params.allowed_token_ids is not None:
        left = {i: w for i, w in left.items() if i in params.allowed_token_ids}
    order = sorted(left, key=lambda i: (-left[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        top_p = _as_float32(params.top_p)
        total, before = sum(left[i] for i in order), 0
        kept: list[int] = []
        equal = len({left[i] for i in order}) == 1
        for i in order:
            share = Fraction(before, total)
            if abs(share - top_p) < MARGIN and before and not (equal and share == top_p):
                raise ValueError(f"top_p {params.top_p} is too near to {float(share)}")
            if not kept or share < top_p:
                kept.append(i)
            before += left[i]
        order = kept
    if params.min_p > 0:
        least = _as_float32(params.min_p) * left[order[0]]
        for i in order:
            if left[i] != left[order[0]] and abs(left[i] / least - 1) < MARGIN:
                raise ValueError(f"min_p {params.min_p} is too near to {left[i]} of {left[order[0]]}")
        order = [i for i in order if left[i] >= least]
    total = sum(left[i] for i in order)
    return [Fraction(left[i] if i in order else 0, total) for i in range(len(weights))]


def _as_float32(value: float) -> Fraction:
    """What a sampler gets."""
    return Fraction(float(np.float32(value)))
