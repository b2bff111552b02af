"""From slots to a SamplingBatch: plain parameters by array operations, others row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from core.contract.batch import Int32
from core.contract.types import SamplingBatch
from core.sampling.params import SamplingParams
from core.scheduler.sequence import Sequence, SlotTable

UInt32 = npt.NDArray[np.uint32]

_NONE: Int32 = np.zeros(0, np.int32)


def sampling_batch(table: SlotTable, slots: Int32, vocab_size: int) -> SamplingBatch:
    """The parameters of the rows that these slots draw."""
    plain = SamplingBatch(
        temperature=table.temperature[slots],
        top_k=table.top_k[slots],
        top_p=table.top_p[slots],
        min_p=table.min_p[slots],
        seed=table.seed[slots],
        position=table.computed[slots],
        choice=table.choice[slots],
    )
    if not table.special:
        return plain
    rows = [(i, s) for i, slot in enumerate(slots.tolist()) if (s := table.special.get(slot)) is not None]
    return _with_special(plain, rows, vocab_size) if rows else plain


def _with_special(plain: SamplingBatch, rows: list[tuple[int, Sequence]], vocab_size: int) -> SamplingBatch:
    n = len(plain.position)
    biases: list[dict[int, float]] = [{} for _ in range(n)]
    logprobs = np.full(n, -1, np.int32)
    bitmask: UInt32 | None = None
    penalties = np.array([[0.0], [0.0], [1.0]], np.float32).repeat(n, 1)
    history: list[tuple[Int32, Int32]] = [(_NONE, _NONE)] * n
    for i, sequence in rows:
        params = sequence.request.params
        biases[i] = _bias(sequence, int(plain.position[i]), vocab_size)
        if params.is_penalized:
            penalties[:, i] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
            history[i] = (
                np.array(sequence.request.prompt_ids, np.int32),
                np.array(sequence.output_ids, np.int32),
            )
        logprobs[i] = -1 if params.logprobs is None else params.logprobs
        if params.allowed_token_ids is not None:
            if bitmask is None:
                bitmask = np.full((n, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            bitmask[i] = allowed_mask(params, vocab_size)
    batch = plain
    if any(biases):
        start = np.cumsum([0, *map(len, biases)]).astype(np.int32)
        ids = np.array([i for bias in biases for i in bias], np.int32)
        values = np.array([v for bias in biases for v in bias.values()], np.float32)
        batch = replace(batch, bias_ids=ids, bias_values=values, bias_start=start)
    if bitmask is not None:
        batch = replace(batch, bitmask=bitmask)
    if any(h[0] is not _NONE for h in history):
        presence, frequency, repetition = penalties
        batch = replace(
            batch, presence=presence, frequency=frequency, repetition=repetition, history=tuple(history)
        )
    return replace(batch, logprobs=logprobs) if (logprobs >= 0).any() else batch


def _bias(sequence: Sequence, position: int, vocab_size: int) -> dict[int, float]:
    """Of the token at `position`: the user's, and -inf for what would end the output too early or complete a
    sequence that is banned.
    """
    request = sequence.request
    bias = dict(request.params.logit_bias or {})
    output = sequence.output_ids
    for *before, last in request.params.bad_words_ids:
        if not before or output[-len(before) :] == before:
            bias[last] = -np.inf
    if position - len(request.prompt_ids) < request.params.min_tokens:
        ends = (*request.eos_ids, *request.params.stop_token_ids)
        bias |= dict.fromkeys((i for i in ends if i < vocab_size), -np.inf)
    return bias


def allowed_mask(params: SamplingParams, vocab_size: int) -> UInt32:
    """Bits of `allowed_token_ids`: uint32 [ceil(V / 32)]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(params.allowed_token_ids or ())] = 1
    mask: UInt32 = np.packbits(bits, bitorder="little").view(np.uint32)
    return mask
