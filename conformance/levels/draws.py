"""L2, sampling: the ends of the noise, penalties, and what is reported of the raw logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from conformance.check import Check, Context
from conformance.drawing import Draw, Drawer, Float32, batch_of
from conformance.levels.sampling import P
from core.contract.spec import BackendSpec
from core.contract.types import SamplingBatch
from core.sampling.reference import gumbel_rows, sample

ENDS = {
    "smallest": ((62408197, 2), (78329562, 44), (148924794, 5)),
    "largest": ((124834, 31), (443126, 118), (990517, 48)),
}
"""Seeds, and ids whose random word at position 2 is 0, or so large that float32 rounds it to 1."""
MARGIN = 0.004
"""Between two noisy logits; far more than rounding, and less than half a word of 2^-32 at the smallest."""


def ends(context: Context, which: str) -> None:
    """Where the random word is 0 or its largest, the noise is finite and what the contract says.

    The id competes with one other, which it beats by a little, and then fails to beat by as much.
    """
    vocab = 128
    seeds = np.array([seed for seed, _ in ENDS[which] for _ in range(2)], np.uint64)
    ids = np.array([i for _, i in ENDS[which] for _ in range(2)])
    others = (ids + 1) % vocab
    rows = np.arange(len(ids))
    position, choice = np.full(len(ids), 2), np.zeros(len(ids), np.int64)
    noise = gumbel_rows(seeds, position, choice, vocab)
    context.require(bool(np.isfinite(noise).all()), "the reference's noise is not finite")
    wins = rows % 2 == 0
    logits: Float32 = np.full((len(ids), vocab), -1000.0, np.float32)
    logits[rows, ids] = 0.0
    logits[rows, others] = noise[rows, ids] - noise[rows, others] - np.where(wins, MARGIN, -MARGIN)
    batch = batch_of([Draw(P(), int(seed)) for seed in seeds], vocab)
    found = Drawer(context.subject, logits, len(ids)).draw(rows.astype(np.int32), batch).tokens
    context.equal(found, np.where(wins, ids, others), f"tokens at the {which} random words")


_BESIDE = (
    P(temperature=0),
    P(),
    P(temperature=0.6, top_k=7),
    P(allowed_token_ids=tuple(range(0, 131, 2))),
    P(temperature=0, allowed_token_ids=tuple(range(1, 131, 3))),
    P(top_p=0.7, min_p=0.01),
    P(logit_bias={3: 2.0, 40: -1.5}, top_k=20),
)
"""What stands beside penalties, row by row."""


def penalties(context: Context, low: float, high: float) -> None:
    """Presence, frequency and repetition, each by its row's history, on logits from `low` to `high`."""
    vocab, rows = 131, 48
    rng = context.rng()
    logits: Float32 = rng.uniform(low, high, (rows, vocab)).astype(np.float32)
    batch = replace(
        batch_of([Draw(_BESIDE[i % len(_BESIDE)], context.seed + i) for i in range(rows)], vocab),
        presence=rng.choice([0.0, 0.7, -1.0], rows).astype(np.float32),
        frequency=rng.choice([0.0, 0.4, 1.5], rows).astype(np.float32),
        repetition=rng.choice([1.0, 1.4, 0.7, 2.0], rows).astype(np.float32),
        # Half of the rows have said nearly everything, so what they draw was penalised.
        history=tuple(
            (
                rng.integers(0, vocab, 9 if i % 2 else 500).astype(np.int32),
                rng.integers(0, vocab // 4, 30).astype(np.int32),
            )
            for i in range(rows)
        ),
    )
    found = Drawer(context.subject, logits, rows).draw(np.arange(rows, dtype=np.int32), batch).tokens
    context.equal(found, sample(logits, batch).tokens, "tokens under penalties")


def log_probabilities(context: Context, vocab: int, most: int, ask: str) -> None:
    """Of the token, its rank, and the most likely ones, in the rows that ask.

    Args:
        most: ids that are asked for. ask: "all" rows, "some", or "none".
    """
    rows = 24
    logits: Float32 = (3 * context.rng().normal(size=(rows, vocab))).astype(np.float32)
    logits[1::4] = np.round(logits[1::4])  # ties
    logits[2::4] *= 200.0  # exponentials that overflow
    at = np.arange(rows)
    asks = {"all": at >= 0, "some": at % 3 > 0, "none": at < 0}[ask]
    counts = [most - i % 2 * (most > 1) if asks[i] else None for i in range(rows)]
    biased = {int(i): 4.0 for i in np.arange(0, vocab, 7)}
    ways = (P(temperature=0), P(), P(temperature=0.4), P(temperature=2.5, top_k=6), P(logit_bias=biased))
    draws = [Draw(replace(ways[i % len(ways)], logprobs=n), context.seed + i) for i, n in enumerate(counts)]
    batch = batch_of(draws, vocab)
    if ask == "none":
        batch = replace(batch, logprobs=np.full(rows, -1, np.int32))
    found = Drawer(context.subject, logits, rows).draw(at.astype(np.int32), batch)
    wanted = sample(logits, batch)
    context.equal(found.tokens, wanted.tokens, "tokens")
    if ask == "none":
        return
    context.require(found.logprobs is not None, "no log-probabilities are given, though rows ask for them")
    given = np.asarray(found.logprobs)
    context.require(bool(np.isnan(given[~asks]).all()), "rows that do not ask get log-probabilities")
    context.equal(np.asarray(found.ranks)[asks], wanted.ranks[asks], "ranks")
    context.equal(np.asarray(found.top_ids)[asks], wanted.top_ids[asks], "most likely ids")
    for what, one, other in (
        ("log-probabilities", given, wanted.logprobs),
        ("log-probabilities of the most likely", np.asarray(found.top_logprobs), wanted.top_logprobs),
    ):
        context.within(one[asks], other[asks], 2e-5 * np.abs(other[asks]) + 2e-5, what)


TEMPERATURES = {"greedy": (0.0,), "drawn": (1.0,), "mixed": (0.0, 1.0)}
"""Of rows, in turn."""
SPOILED = (1, 3, 4, 6)
"""Rows whose largest logit is no finite number."""
BAD = 40
"""The id that spoils most of them."""


def _spoiled(context: Context, rows: int, vocab: int) -> Float32:
    """Logits [rows, V], of which those of `SPOILED` hold a NaN, an infinity, -inf alone, and NaN alone."""
    logits: Float32 = context.rng().normal(size=(rows, vocab)).astype(np.float32)
    logits[1, BAD], logits[3, BAD], logits[4], logits[6] = np.nan, np.inf, -np.inf, np.nan
    logits[5, BAD] = -np.inf  # an id that cannot be drawn spoils nothing
    return logits


def not_a_number(context: Context, mix: str, kind: str) -> None:
    """Rows whose largest logit is no finite number draw -1 and report nothing; their neighbours do not mind.

    Args:
        kind: "plain" rows; "cut", where the id that spoils a row is not even allowed; "told", with the five
            most likely ids; "ranked", with what is reported of the token alone.
    """
    vocab, rows = 65, 8
    logits = _spoiled(context, rows, vocab)
    allowed = tuple(range(BAD)) if kind == "cut" else None
    most = {"told": 5, "ranked": 0}.get(kind)
    params = [P(temperature=t, allowed_token_ids=allowed, logprobs=most) for t in TEMPERATURES[mix]]
    draws = [Draw(params[i % len(params)], context.seed + i) for i in range(rows)]
    batch = batch_of(draws, vocab)
    found = Drawer(context.subject, logits, rows).draw(np.arange(rows, dtype=np.int32), batch)
    wanted = sample(logits, batch)
    spoiled: npt.NDArray[np.bool_] = np.isin(np.arange(rows), SPOILED)
    nothing = np.full(len(SPOILED), -1)
    context.equal(np.asarray(found.tokens)[spoiled], nothing, "tokens of rows without a finite logit")
    context.equal(found.tokens, wanted.tokens, "tokens")
    if most is not None:
        context.require(
            np.shape(found.top_ids) == (rows, most),
            f"most likely ids have shape {np.shape(found.top_ids)}, but {(rows, most)} is wanted",
        )
        context.equal(np.asarray(found.top_ids)[~spoiled], wanted.top_ids[~spoiled], "most likely ids")
        context.require(bool(np.isnan(found.logprobs[spoiled]).all()), "spoiled rows get log-probabilities")
        context.require(not np.isnan(found.logprobs[~spoiled]).any(), "other rows get none")


def after_no_number(context: Context, mix: str) -> None:
    """A step submitted meanwhile gets id 0 for a row that drew nothing, and for other rows what they drew."""
    vocab, rows = 65, 8
    logits = _spoiled(context, vocab, vocab)
    # What follows id 0, and what would follow the last id or one that was there before.
    logits[0, 9] = logits[-1, 11] = logits[11, 12] = 80.0
    which = np.arange(rows, dtype=np.int32)

    def batch(position: int) -> SamplingBatch:
        temperatures = TEMPERATURES[mix]
        kinds = [P(temperature=temperatures[i % len(temperatures)]) for i in range(rows)]
        return batch_of([Draw(kind, context.seed + i, position) for i, kind in enumerate(kinds)], vocab)

    drawer = Drawer(context.subject, logits, rows)
    before = drawer.draw(np.full(rows, vocab - 1, np.int32), batch(2)).tokens
    context.equal(before, np.full(rows, 11), "tokens before")
    first = sample(logits[:rows], batch(3)).tokens
    context.equal(drawer.draw(which, batch(3), is_one_call=True).tokens, first, "tokens")
    fed = drawer.draw(which, batch(4), sources=which).tokens
    wanted = sample(logits[np.maximum(first, 0)], batch(4)).tokens
    context.equal(fed, wanted, "tokens of the next step, fed from `last`")


_AS_THEY_ARE = ("dtypes:float32",)
"""Where logits come from a product of a narrow dtype, a NaN in one row would be one in all."""


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for which in ENDS:
        about = f"the {which} random words give finite noise, and the reference's"
        yield Check(f"L2/sampling/{which}-word", partial(ends, which=which), about)
    ranges = {"mixed": (-4.0, 4.0), "positive": (0.0, 1.0), "negative": (-1.0, 0.0), "low": (-9.0, -1.0)}
    for name, (low, high) in ranges.items():
        about = f"penalties by each row's own history, on {name} logits"
        yield Check(f"L2/sampling/penalties-{name}", partial(penalties, low=low, high=high), about)
    for vocab, most in ((129, 0), (129, 1), (1031, 20), (9, 6)):
        for ask in ("all", "some"):
            run = partial(log_probabilities, vocab=vocab, most=most, ask=ask)
            about = f"what is reported of the raw logits: {most} ids of {vocab}, {ask} rows ask"
            yield Check(f"L2/sampling/log-probabilities-{vocab}-{most}-{ask}", run, about)
    run = partial(log_probabilities, vocab=129, most=1, ask="none")
    yield Check("L2/sampling/log-probabilities-none", run, "a batch in which no row asks is drawn as any")
    about = "a row whose largest logit is no finite number draws -1, and spoils no other"
    for kind in ("plain", "cut", "told", "ranked"):
        for mix in TEMPERATURES:
            run = partial(not_a_number, mix=mix, kind=kind)
            yield Check(f"L2/sampling/not-a-number-{kind}-{mix}", run, about, _AS_THEY_ARE, is_waivable=False)
    about = "after a row that drew nothing, `last` has id 0 for it, and its own token for every other"
    for mix in TEMPERATURES:
        run = partial(after_no_number, mix=mix)
        yield Check(f"L2/sampling/after-not-a-number-{mix}", run, about, _AS_THEY_ARE, is_waivable=False)
