"""Whether a seeded draw is decided: no candidate is so near to another one, or to a cut, that logits that are
off by a margin could give another token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from core.sampling.params import SamplingParams
from core.sampling.reference import allowed, gumbel

NOISE = 1e-5
"""By how much noise and its sum with a logit may be off in another float32 arithmetic."""


def drawn(
    logits: npt.NDArray[np.float64], params: SamplingParams, seed: int, position: int, choice: int = 0
) -> int:
    """The token of logits [V] under temperature, top_k, top_p and min_p, by the reference's rules."""
    scaled = (logits / params.temperature).astype(np.float32)
    noisy = scaled + gumbel(seed, position, choice, len(logits))
    return int(np.argmax(np.where(allowed(scaled, params.top_k, params.top_p, params.min_p), noisy, -np.inf)))


def is_decided(
    logits: npt.NDArray[np.float64],
    params: SamplingParams,
    seed: int,
    position: int,
    margin: float,
    choice: int = 0,
) -> bool:
    """Whether logits [V], each off by at most `margin`, give the same token at this position.

    Of parameters it knows temperature, top_k, top_p and min_p.
    """
    if params.temperature == 0:
        best = np.sort(logits)[-2:]
        return bool(best[1] - best[0] > 2 * margin)
    t = params.temperature
    scaled = (logits / t).astype(np.float32)
    noisy = scaled + gumbel(seed, position, choice, len(logits))
    off = margin / t
    sure, possible = _bounds(scaled.astype(np.float64), params, off)
    winner = drawn(logits, params, seed, position, choice)
    rivals = possible & (noisy >= noisy[winner] - 2 * off - NOISE)
    return bool(sure[winner]) and int(rivals.sum()) == 1


def _bounds(
    scaled: npt.NDArray[np.float64], params: SamplingParams, off: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Ids that pass every cut whatever the error is, and ids that may: bool [V] each."""
    sure, possible = np.ones(len(scaled), np.bool_), np.ones(len(scaled), np.bool_)
    left = np.sort(scaled)[::-1]
    if 0 < params.top_k < len(scaled):
        kth, after = left[params.top_k - 1 : params.top_k + 1]
        sure &= scaled > after + 2 * off
        possible &= scaled >= kth - 2 * off
        left = left[: params.top_k]
    if params.top_p < 1:
        p = np.exp(left - left[0])
        sums = np.concatenate([[0.0], np.cumsum(p)]) / p.sum()
        # Ids whose logits are nearer than both errors may come in any order.
        least = sums[np.searchsorted(-left, -scaled - 2 * off, side="left")]
        most = sums[np.maximum(np.searchsorted(-left, -scaled + 2 * off, side="right") - 1, 0)]
        # Each probability is off by a factor of at most exp(2 off), and so are sums of them.
        slack = np.expm1(4 * off) + 1e-6
        sure &= most < params.top_p - slack
        possible &= least < params.top_p + slack
    if params.min_p > 0:
        least = scaled.max() + np.log(params.min_p)
        sure &= scaled >= least + 2 * off
        possible &= scaled >= least - 2 * off
    # The best passes every cut, if it is known which one that is.
    best = scaled >= scaled.max() - 2 * off
    return sure | best if best.sum() == 1 else sure, possible
