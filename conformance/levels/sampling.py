"""L2, sampling: the draws of the contract, token by token, and their distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import log
from typing import Any

import numpy as np

from conformance.check import Check, Context, Failed
from conformance.drawing import Draw, Drawer, Float32, batch_of, repeated
from conformance.gtest import ALPHA, exact, g_test
from core.contract.spec import BackendSpec
from core.sampling.params import SamplingParams
from core.sampling.reference import gumbel_rows, sample

VOCABULARIES = (37, 128, 1031)
ROWS = 4000
NEAR = 1e-3
"""Noisy logits nearer than this to the largest may be ordered by another rounding."""


def P(**fields: Any) -> SamplingParams:
    """Parameters, for short."""
    return SamplingParams(**fields)


def _scattered(vocab: int, *weights: int) -> tuple[int, ...]:
    found = [0] * vocab
    for rank, weight in enumerate(weights):
        found[(rank * 37 + 11) % vocab] = weight
    return tuple(found)


DISTRIBUTIONS: dict[str, tuple[tuple[int, ...], SamplingParams]] = {
    "flat": ((1,) * 64, P()),
    "peaked": (_scattered(64, 400, *[1] * 63), P()),
    "zipf": (_scattered(64, *(720_720 // rank for rank in range(1, 65))), P()),
    "two-points": (_scattered(64, 9, 1), P()),
    "hot": (_scattered(64, *(720_720 // rank for rank in range(1, 65))), P(temperature=40.0)),
    "top_k-in-ties": (_scattered(64, 9, 4, 4, 4, 4, 2, 2, 1), P(top_k=3)),
    "top_p-on-a-boundary": (_scattered(64, *[1] * 8), P(top_p=0.5)),
    "top_p": (_scattered(64, *(720_720 // rank for rank in range(1, 65))), P(top_p=0.8)),
    "min_p": (_scattered(64, 100, 50, 50, 10), P(min_p=0.4999)),
    "all-cuts": (
        _scattered(64, *(720_720 // rank for rank in range(1, 65))),
        P(top_k=20, top_p=0.9, min_p=0.15, temperature=1.7),
    ),
}


def distribution(context: Context, name: str) -> None:
    """A G-test; what looks wrong is drawn again, four times as often."""
    weights, params = DISTRIBUTIONS[name]
    t = params.temperature
    logits = np.array([[t * (log(w) if w else -2000.0) for w in weights]], np.float32)
    wanted = exact(weights, params)
    drawer = Drawer(context.subject, logits, ROWS)
    for round_, times in enumerate((4, 16)):
        counts = np.zeros(len(weights), np.int64)
        for i in range(times):
            one = batch_of([Draw(params, 0)], len(weights))
            seeds = _seeds(context, round_ * 100 + i)
            tokens = drawer.draw(np.zeros(ROWS, np.int32), repeated(one, ROWS, seed=seeds)).tokens
            _in_range(tokens, len(weights))
            counts += np.bincount(tokens, minlength=len(weights))
        p = g_test(counts, wanted)
        context.record(f"p_{round_ + 1}", p)
        if p >= ALPHA:
            return
    raise Failed(f"draws of {name!r} do not follow their distribution: p = {p:.3g} in {counts.sum()} draws")


def _seeds(context: Context, number: int) -> Any:
    rng = np.random.Generator(np.random.Philox(key=(context.seed + number) % 2**64))
    return rng.integers(0, 2**64, ROWS, np.uint64)


def _in_range(tokens: Any, vocab: int) -> None:
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise Failed(f"tokens from {tokens.min()} to {tokens.max()} were drawn of a vocabulary of {vocab}")


CHOICES: dict[str, Callable[[int], SamplingParams]] = {
    "greedy": lambda v: P(temperature=0),
    "plain": lambda v: P(),
    "top_k": lambda v: P(top_k=5),
    "top_k-1": lambda v: P(top_k=1),
    "top_k-1-top_p": lambda v: P(top_k=1, top_p=0.9),
    "top_p": lambda v: P(top_p=0.6),
    "min_p": lambda v: P(min_p=0.1),
    "min_p-1": lambda v: P(min_p=1.0),
    "hot": lambda v: P(temperature=5.0, top_k=v - 1),
    "cool": lambda v: P(temperature=0.5),
    "cold": lambda v: P(temperature=0.05, top_k=9),
    "top_p-small": lambda v: P(top_p=0.05),
    "top_k-allowed": lambda v: P(top_k=3, allowed_token_ids=tuple(range(1, v, 3))),
    "bias": lambda v: P(logit_bias={0: 3.0, v - 1: float("-inf"), v // 2: 1.5}),
    "allowed": lambda v: P(allowed_token_ids=tuple(range(v - 7, v))),
    "min_tokens": lambda v: P(min_tokens=4, stop_token_ids=(v - 1, 2), max_tokens=9),
    "all": lambda v: P(top_k=20, top_p=0.9, min_p=0.02, temperature=1.5, logit_bias={3: 2.0}),
}


FORMS: dict[str, Callable[[Float32], Float32]] = {
    "ties": lambda x: (np.round(2 * x) / 2).astype(np.float32),
    "high": lambda x: (x + 1000).astype(np.float32),
    "low": lambda x: (x - 1000).astype(np.float32),
}
"""Of logits: many that are equal, and such whose exponentials overflow or vanish."""


def tokens(context: Context, choice: str, vocab: int, form: str = "", rows: int = 96) -> None:
    """Token by token those of the reference sampler, from the same logits."""
    logits: Float32 = (3 * context.rng().normal(size=(rows, vocab))).astype(np.float32)
    if form:
        logits = FORMS[form](logits)
    params = CHOICES[choice](vocab)
    rng = context.rng()
    draws = [
        Draw(params, int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(2, 1 << 20)), int(i % 3))
        for i in range(rows)
    ]
    batch = batch_of(draws, vocab)
    found = Drawer(context.subject, logits, rows).draw(np.arange(rows, dtype=np.int32), batch).tokens
    _in_range(found, vocab)
    wanted = sample(logits, batch).tokens
    wrong = np.flatnonzero(found != wanted)
    if not len(wrong):
        return
    noisy = logits / np.maximum(batch.temperature, 1e-9)[:, None]
    noisy += gumbel_rows(batch.seed, batch.position, batch.choice, vocab)
    for row in wrong.tolist():
        if params.temperature and abs(noisy[row, found[row]] - noisy[row, wanted[row]]) < NEAR:
            continue
        raise Failed(
            f"row {row} draws {found[row]}, but {wanted[row]} is wanted ({len(wrong)} of {rows} rows differ)"
        )


def neighbours(context: Context) -> None:
    """A token does not depend on the rows beside its own, nor on its place in the batch."""
    vocab, rows = 128, 32
    logits: Float32 = (3 * context.rng().normal(size=(rows, vocab))).astype(np.float32)
    kinds = [make(vocab) for make in CHOICES.values()]
    draws = [Draw(kinds[i % len(kinds)], context.seed + i) for i in range(rows)]
    drawer = Drawer(context.subject, logits, rows)
    order = np.arange(rows, dtype=np.int32)
    together = drawer.draw(order, batch_of(draws, vocab)).tokens
    turned = drawer.draw(order[::-1].copy(), batch_of(draws[::-1], vocab)).tokens[::-1]
    context.equal(turned, together, "tokens of the batch turned round")
    alone = [drawer.draw(order[i : i + 1], batch_of([draws[i]], vocab)).tokens[0] for i in range(rows)]
    context.equal(np.array(alone), together, "tokens of rows alone")


def keyed(context: Context, what: str) -> None:
    """Another seed, position or choice draws otherwise; the same ones draw the same."""
    vocab, rows = 1031, 64
    logits = np.zeros((1, vocab), np.float32)
    drawer = Drawer(context.subject, logits, rows)
    one = batch_of([Draw(P(), 7)], vocab)
    keys: dict[str, dict[str, Any]] = {
        "seed": {"seed": np.arange(rows).astype(np.uint64) << np.uint64(32)},
        "position": {"position": np.arange(2, rows + 2).astype(np.int32)},
        "choice": {"choice": np.arange(rows).astype(np.int32)},
    }
    many = keys[what]
    which = np.zeros(rows, np.int32)
    first = drawer.draw(which, repeated(one, rows, **many)).tokens
    again = drawer.draw(which, repeated(one, rows, **many)).tokens
    context.equal(again, first, "the same draws again")
    different = len(set(first.tolist()))
    context.require(different > rows * 0.8, f"{rows} draws of another {what} each give {different} tokens")


def masked(context: Context, draws: int) -> None:
    """What is masked is never drawn, however likely it was."""
    vocab = 67
    allowed = (0, 31, 32, 63, 66)
    logits = np.zeros((1, vocab), np.float32)
    logits[0, 40] = 50.0
    drawer = Drawer(context.subject, logits, ROWS)
    params = P(allowed_token_ids=allowed, temperature=50.0)
    one = batch_of([Draw(params, 0)], vocab)
    for i in range(-(-draws // ROWS)):
        batch = repeated(one, ROWS, seed=_seeds(context, i))
        found = set(drawer.draw(np.zeros(ROWS, np.int32), batch).tokens.tolist())
        if not found <= set(allowed):
            raise Failed(f"token {min(found - set(allowed))} was drawn, but only {allowed} are allowed")


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for name in DISTRIBUTIONS:
        run = partial(distribution, name=name)
        yield Check(f"L2/sampling/distribution-{name}", run, f"draws follow the exact distribution: {name}")
    for choice in CHOICES:
        for vocab in VOCABULARIES:
            about = f"{choice}: the reference's tokens from the same logits, vocabulary {vocab}"
            run = partial(tokens, choice=choice, vocab=vocab)
            yield Check(f"L2/sampling/tokens-{choice}-{vocab}", run, about)
    for form in FORMS:
        for choice in ("greedy", "top_k", "top_p", "min_p", "all"):
            about = f"{choice}: the reference's tokens from logits of the form {form}"
            run = partial(tokens, choice=choice, vocab=1031, form=form)
            yield Check(f"L2/sampling/tokens-{choice}-{form}", run, about)
    for choice in ("plain", "top_p"):
        about = f"{choice}: the reference's tokens of a vocabulary beyond 65,536"
        run = partial(tokens, choice=choice, vocab=70_001, rows=3)
        yield Check(f"L2/sampling/tokens-{choice}-70001", run, about)
    for rows in (33, 257):
        about = f"all: the reference's tokens in each of {rows} rows"
        run = partial(tokens, choice="all", vocab=128, rows=rows)
        yield Check(f"L2/sampling/tokens-all-rows-{rows}", run, about)
    for what in ("seed", "position", "choice"):
        about = f"the {what} alone decides between draws"
        yield Check(f"L2/sampling/keyed-by-{what}", partial(keyed, what=what), about)
    about = "a token depends on its own row alone"
    yield Check("L2/sampling/neighbours", neighbours, about, is_waivable=False)
    yield Check("L2/sampling/masked", partial(masked, draws=20_000), "what is masked is never drawn")
    yield Check(
        "L2/sampling/masked-ten-million",
        partial(masked, draws=10_000_000),
        "what is masked is never drawn, in ten million draws",
        timeout_s=1800.0,
        is_quick=False,
    )
