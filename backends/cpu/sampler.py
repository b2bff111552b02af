"""The sampler: greedy rows by torch, every other row by the reference sampler, so that both agree."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backends.cpu.arrays import to_numpy
from core.contract.interfaces import ReferenceSampler
from core.contract.types import SampledTokens, SamplingBatch

NEUTRAL = {"presence": 0.0, "frequency": 0.0, "repetition": 1.0, "logprobs": -1}
"""Values of the optional per-row fields with which a row is sampled as if they were absent."""


class CpuSampler:
    """Draws tokens from logits on the host. `reference`: draws the rows that are not plainly greedy."""

    def __init__(self, reference: ReferenceSampler) -> None:
        self._reference = reference

    def sample(self, logits: torch.Tensor, sampling: SamplingBatch) -> SampledTokens:
        """Tokens of logits [n, V]."""
        greedy = greedy_rows(sampling)
        if greedy.all():
            return SampledTokens(_argmax(logits))
        if sampling.logprobs is not None or not greedy.any():
            return self._reference(to_numpy(logits.float()), sampling)
        drawn = np.flatnonzero(~greedy)
        tokens = _argmax(logits)
        part = to_numpy(logits[torch.from_numpy(drawn)].float())
        tokens[drawn] = self._reference(part, take_rows(sampling, drawn)).tokens
        return SampledTokens(tokens)


def greedy_rows(sampling: SamplingBatch) -> npt.NDArray[np.bool_]:
    """bool [n]: rows whose token is the largest logit's, with nothing else to apply or to report."""
    greedy: npt.NDArray[np.bool_] = np.asarray(sampling.temperature) == 0
    if sampling.bitmask is not None:
        return np.zeros_like(greedy)
    for name, neutral in NEUTRAL.items():
        values = getattr(sampling, name)
        if values is not None:
            greedy = greedy & (np.asarray(values) == neutral)
    if sampling.bias_start is not None:
        greedy = greedy & (np.diff(sampling.bias_start) == 0)
    return greedy


def take_rows(sampling: SamplingBatch, rows: npt.NDArray[np.int64]) -> SamplingBatch:
    """The parameters of some rows."""
    skipped = ("bias_ids", "bias_values", "bias_start", "history")
    names = (f.name for f in fields(sampling) if f.name not in skipped)
    taken: dict[str, Any] = {
        name: np.asarray(getattr(sampling, name))[rows]
        for name in names
        if getattr(sampling, name) is not None
    }
    if sampling.history is not None:
        taken["history"] = tuple(sampling.history[r] for r in rows)
    if sampling.bias_start is not None:
        start = np.asarray(sampling.bias_start)
        picked = np.concatenate([np.arange(start[r], start[r + 1]) for r in rows])
        counts = np.diff(start)[rows]
        taken["bias_start"] = np.concatenate([[0], np.cumsum(counts)]).astype(start.dtype)
        taken["bias_ids"] = np.asarray(sampling.bias_ids)[picked]
        taken["bias_values"] = np.asarray(sampling.bias_values)[picked]
    return replace(sampling, **taken)


def _argmax(logits: torch.Tensor) -> npt.NDArray[np.int32]:
    # torch's CPU argmax gives the first of equal values, which is the lowest id; NaN counts as the largest.
    found = logits.argmax(-1, keepdim=True)
    drawn = logits.gather(-1, found).isfinite()
    tokens: npt.NDArray[np.int32] = torch.where(drawn, found, -1)[:, 0].to(torch.int32).numpy()
    return tokens
