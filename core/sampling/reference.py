"""The reference sampler: logits and parameters to tokens, on the host.

token = argmax over allowed v of logit[v] / T + Gumbel(u), so a draw is a function of the request's seed and
the token's position alone. u comes from Philox4x32-10 (Salmon et al., 2011) with key = the 64-bit seed and
counter = (position, choice, v // 4, purpose), lane v % 4. Allowed are, in order: the `top_k` largest logits;
of these the most likely ones whose probabilities (after the temperature) sum to at least `top_p`; of these
the ones at least `min_p` times as likely as the best. Equal values rank by lower id first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.types import SampledTokens, SamplingBatch

Float32 = npt.NDArray[np.float32]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]

SAMPLE, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3
"""Purposes of a draw: the fourth word of the counter."""

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_AT_ONCE = 1 << 16
"""Logits for which noise is made at a time: so many fit into a core's cache."""


def philox(counter: UInt32, key: tuple[int, int] | tuple[UInt64, UInt64]) -> UInt32:
    """Philox4x32-10: counter uint32 [n, 4], key two 32-bit words (low first), for all or uint64 [n] each ->
    uint32 [n, 4].
    """
    c0, c1, c2, c3 = counter.T.astype(np.uint64)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, position: int, choice: int, vocab_size: int, purpose: int = SAMPLE) -> Float32:
    """Gumbel noise for every token id of one draw: float32 [vocab_size]."""
    key = np.array([seed], np.uint64), np.array([position]), np.array([choice])
    return gumbel_rows(*key, vocab_size, purpose).reshape(-1)


def gumbel_rows(
    seed: UInt64,
    position: npt.NDArray[np.integer[Any]],
    choice: npt.NDArray[np.integer[Any]],
    vocab_size: int,
    purpose: int = SAMPLE,
) -> Float32:
    """Gumbel noise of n draws, keyed by [n] each: float32 [n, vocab_size]."""
    n, blocks = len(seed), -(-vocab_size // 4)
    counter = np.empty((n, blocks, 4), np.uint32)
    counter[..., 0], counter[..., 1], counter[..., 3] = position[:, None], choice[:, None], purpose
    counter[..., 2] = np.arange(blocks)
    key = np.repeat(np.asarray(seed, np.uint64), blocks)
    bits = philox(counter.reshape(-1, 4), (key & _LOW, key >> _WORD)).reshape(n, -1)[:, :vocab_size]
    u = np.minimum(((bits.astype(np.float64) + 0.5) * 2.0**-32).astype(np.float32), np.float32(1 - 2.0**-24))
    noise: Float32 = -np.log(-np.log1p(-u))
    return noise


def allowed(scaled: Float32, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Which ids may be drawn: scaled logits float32 [V] -> bool [V]. At least one id is allowed."""
    keep = np.ones(len(scaled), np.bool_)
    if 0 < top_k < len(scaled) or top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        if 0 < top_k < len(scaled):
            keep[order[top_k:]] = False
            order = order[:top_k]
        if top_p < 1:
            p = np.exp((scaled[order] - scaled[order[0]]).astype(np.float64))
            before = np.cumsum(p) - p
            # The first stays even where float32 has made `top_p` 0.
            keep[order[1:][before[1:] >= top_p * p.sum()]] = False
    if min_p > 0:
        keep &= scaled >= scaled.max() + np.log(min_p)
    return keep


def sample(logits: Float32, sampling: SamplingBatch) -> SampledTokens:
    """Draw one token per row: logits float32 [n, V] -> SampledTokens with tokens int32 [n].

    Whoever makes the batch sees to it that each row allows a token. Nothing is drawn, and the token is -1,
    where the largest logit is no finite number: the model gave NaN or infinity.
    """
    raw, logits = logits, _permitted(logits, sampling)
    tokens = logits.argmax(-1).astype(np.int32)
    # NaN counts as the largest in argmax and max, so what they find tells of the whole row.
    broken = ~np.isfinite(np.take_along_axis(logits, tokens[:, None], 1)[:, 0])
    if raw is not logits:
        broken |= ~np.isfinite(raw.max(-1))
    tokens[broken] = -1
    drawn = np.flatnonzero((np.asarray(sampling.temperature) > 0) & ~broken)
    many = max(1, _AT_ONCE // logits.shape[1])
    for start in range(0, len(drawn), many):
        rows = drawn[start : start + many]
        tokens[rows] = _draw(logits[rows], rows, sampling)
    return _with_logprobs(tokens, raw, sampling)


def _draw(logits: Float32, rows: npt.NDArray[np.intp], sampling: SamplingBatch) -> npt.NDArray[np.intp]:
    """Tokens [k] of these rows [k] of the batch, whose logits are [k, V] and temperatures above 0."""
    temperature, top_k, top_p, min_p, seed, position, choice = (
        np.asarray(getattr(sampling, name))[rows]
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position", "choice")
    )
    scaled = logits / temperature.astype(np.float32)[:, None]
    noisy = scaled + gumbel_rows(seed, position, choice, logits.shape[1])
    for i in np.flatnonzero((top_k > 0) | (top_p < 1) | (min_p > 0)):
        noisy[i, ~allowed(scaled[i], int(top_k[i]), float(top_p[i]), float(min_p[i]))] = -np.inf
    tokens: npt.NDArray[np.intp] = noisy.argmax(-1)
    return tokens


def _permitted(logits: Float32, sampling: SamplingBatch) -> Float32:
    """Logits with biases and penalties, and -inf where an id is not allowed."""
    if sampling.bias_start is None and sampling.bitmask is None and sampling.history is None:
        return logits
    # NaN and infinity pass through quietly: `sample` refuses their rows.
    with np.errstate(invalid="ignore", over="ignore"):
        return _changed(logits.astype(np.float32), sampling)


def _changed(found: Float32, sampling: SamplingBatch) -> Float32:
    if sampling.bias_start is not None:
        rows = np.repeat(np.arange(len(found)), np.diff(sampling.bias_start))
        found[rows, sampling.bias_ids] += sampling.bias_values
    if sampling.bitmask is not None:
        bits = np.unpackbits(
            np.asarray(sampling.bitmask, np.uint32).view(np.uint8), axis=-1, bitorder="little"
        )
        found[bits[:, : found.shape[1]] == 0] = -np.inf
    for i, (prompt, output) in enumerate(sampling.history or ()):
        penalize(
            found[i],
            np.asarray(prompt),
            np.asarray(output),
            *(np.float32(p[i]) for p in (sampling.presence, sampling.frequency, sampling.repetition)),
        )
    return found


def penalize(
    logits: Float32,
    prompt: npt.NDArray[np.int32],
    output: npt.NDArray[np.int32],
    presence: np.float32,
    frequency: np.float32,
    repetition: np.float32,
) -> None:
    """Apply penalties to one row of logits float32 [V] in place, each product and difference in float32.

    First repetition, to ids of prompt (int32 [p]) and output (int32 [o]); then frequency and presence, to
    those of the output.
    """
    if repetition != 1:
        seen = np.zeros(len(logits), np.bool_)
        seen[prompt] = seen[output] = True
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
    if presence or frequency:
        counts = np.bincount(output, minlength=len(logits)).astype(np.float32)
        seen = counts > 0
        logits[seen] = logits[seen] - frequency * counts[seen] - presence


def _with_logprobs(tokens: npt.NDArray[np.int32], raw: Float32, sampling: SamplingBatch) -> SampledTokens:
    """What rows that ask for it get to know of the raw logits."""
    if sampling.logprobs is None:
        return SampledTokens(tokens)
    wanted = np.where(tokens < 0, -1, np.asarray(sampling.logprobs))
    return SampledTokens(tokens) if (wanted < 0).all() else logprobs_of(tokens, raw, wanted)


def logprobs_of(tokens: npt.NDArray[np.int32], raw: Float32, wanted: npt.NDArray[np.int32]) -> SampledTokens:
    """Log-probabilities and ranks of tokens [n] under raw logits [n, V], and the `wanted` [n] most likely ids
    of each row; rows that want -1 are left out (NaN).
    """
    n, k = len(tokens), int(np.max(wanted))
    logprobs, ranks = np.full(n, np.nan, np.float32), np.zeros(n, np.int32)
    top_ids, top = np.zeros((n, k), np.int32), np.full((n, k), np.nan, np.float32)
    for i in np.flatnonzero(np.asarray(wanted) >= 0):
        row = raw[i].astype(np.float64)
        with np.errstate(invalid="ignore"):  # a prompt's logits may be no numbers
            peak = row.max()
            normal = row - (peak + np.log(np.exp(row - peak).sum()))
        logprobs[i] = normal[tokens[i]]
        ranks[i] = 1 + np.count_nonzero(raw[i] > raw[i][tokens[i]])
        top_ids[i] = _largest(raw[i], k)
        top[i] = normal[top_ids[i]]
    return SampledTokens(tokens, logprobs, ranks, top_ids, top)


def _largest(row: Float32, k: int) -> npt.NDArray[np.int32]:
    """Ids of the k largest values, in falling order, ties to the lower id."""
    if k == 0:
        return np.zeros(0, np.int32)
    # A value that is none ranks last: a broken model is no reason for the engine to stop.
    row = np.where(np.isnan(row), np.float32(-np.inf), row)
    least = np.partition(row, -k)[-k]
    candidates = np.flatnonzero(row >= least)
    order = np.argsort(-row[candidates], kind="stable")[:k]
    return candidates[order].astype(np.int32)
