"""Draws of every backend follow the exact distribution, and what is masked is never drawn.

Seeds are fixed, so a test passes always or never. Under other seeds one of these tests would fail by chance
with a probability of `gtest.ALPHA`, one in a million; all together, of less than one in ten thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import inf, log
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conformance.gtest import ALPHA, exact, g_test
from core.contract.errors import RequestError
from core.sampling import reference
from core.sampling.params import MAX_TEMPERATURE, MIN_TEMPERATURE, SamplingParams
from core.sampling.reference import sample
from tests.backends.harness import BACKENDS
from tests.sampling.drawing import EOS, Draw, Drawer, batch_of, repeated

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
V = 64
ROWS = 15_000
ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def scattered(*weights: int) -> tuple[int, ...]:
    """These weights over V ids in no order, the other ids with 0."""
    found = [0] * V
    for rank, weight in enumerate(weights):
        found[(rank * 37 + 11) % V] = weight
    return tuple(found)


def ids_of(*ranks: int) -> tuple[int, ...]:
    """Where `scattered` puts its weights of these ranks."""
    return tuple((rank * 37 + 11) % V for rank in ranks)


@dataclass(frozen=True)
class Case:
    """A distribution.

    Attributes:
        weights: whole numbers in proportion to exp(logit / temperature); 0 = improbable beyond float64.
        params: the cuts; without `logit_bias`.
        factors: by how much a bias multiplies an id's weight; 0 = it is forbidden.
    """

    weights: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    factors: dict[int, int] = field(default_factory=dict)

    @property
    def logits(self) -> Float32:
        """float32 [V]."""
        t = self.params.temperature
        return np.array([t * (log(w) if w else -2000.0) for w in self.weights], np.float32)

    @property
    def biased(self) -> SamplingParams:
        """The parameters with the bias."""
        if not self.factors:
            return self.params
        t = self.params.temperature
        bias = {i: t * log(f) if f else -inf for i, f in self.factors.items()}
        return SamplingParams(**{**vars(self.params), "logit_bias": bias})

    @property
    def exact(self) -> list[Fraction]:
        """The distribution of the token."""
        return exact([w * self.factors.get(i, 1) for i, w in enumerate(self.weights)], self.params)


def P(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


ZIPF = scattered(*(720_720 // rank for rank in range(1, V + 1)))
PEAKED = scattered(400, *[1] * (V - 1))
FLAT = (1,) * V
EIGHT = scattered(*[1] * 8)
TIES = scattered(9, 4, 4, 4, 4, 2, 2, 1)
HALVES = scattered(100, 50, 50, 10)
_ABOVE = float(np.nextafter(np.float32(0.5), np.float32(1)))

CASES = {
    "flat": Case(FLAT),
    "peaked": Case(PEAKED),
    "zipf": Case(ZIPF),
    "two points": Case(scattered(9, 1)),
    "cold": Case(ZIPF, P(temperature=0.05)),
    "hot": Case(ZIPF, P(temperature=40.0)),
    "coldest": Case(scattered(5, 4, 1), P(temperature=MIN_TEMPERATURE)),
    "hottest": Case(scattered(5, 4, 1), P(temperature=MAX_TEMPERATURE)),
    "top_k in ties": Case(TIES, P(top_k=3)),
    "top_k in ties of the largest": Case(scattered(3, 3, 3, 1), P(top_k=2)),
    "top_k of one": Case(FLAT, P(top_k=1)),
    "top_k above all": Case(ZIPF, P(top_k=V + 5)),
    "top_k one below all": Case(FLAT, P(top_k=V - 1)),
    "top_p on a boundary": Case(EIGHT, P(top_p=0.5)),
    "top_p on the next boundary": Case(EIGHT, P(top_p=0.625)),
    "top_p after a boundary": Case(EIGHT, P(top_p=0.5001)),
    "top_p in ties": Case(TIES, P(top_p=0.6)),
    "top_p": Case(ZIPF, P(top_p=0.8)),
    "top_p that leaves one": Case(FLAT, P(top_p=1e-60)),
    "min_p of one in ties": Case(scattered(7, 7, 7, 6, 1), P(min_p=1.0)),
    "min_p just passed": Case(HALVES, P(min_p=0.4999)),
    "min_p just missed": Case(HALVES, P(min_p=0.5001)),
    "top_p of what top_k left": Case(ZIPF, P(top_k=10, top_p=0.7)),
    "all cuts": Case(ZIPF, P(top_k=20, top_p=0.9, min_p=0.15, temperature=1.7)),
    "one allowed": Case(ZIPF, P(allowed_token_ids=ids_of(60))),
    "allowed before top_k": Case(ZIPF, P(allowed_token_ids=ids_of(1, 3, 5, 50), top_k=3)),
    "bias": Case(ZIPF, P(), dict(zip(ids_of(0, 30, 62), (0, 20, 3), strict=True))),
    "bias before the cuts": Case(ZIPF, P(top_k=9, top_p=0.8, temperature=0.7), {ids_of(40)[0]: 30}),
}


@cache
def drawer(backend: str) -> Drawer:
    return Drawer(backend, np.stack([case.logits for case in CASES.values()]), ROWS)


def counts_of(backend: str, name: str, params: SamplingParams) -> npt.NDArray[np.int64]:
    """How often each id is drawn from a case's logits, one draw from each of ROWS seeds."""
    seeds = np.arange(ROWS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sampling = repeated(batch_of([Draw(params, 0)], V), ROWS, seed=seeds)
    which = np.full(ROWS, list(CASES).index(name), np.int32)
    return np.bincount(drawer(backend).draw(which, sampling).tokens, minlength=V)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(backend: str, name: str) -> None:
    case = CASES[name]
    p = g_test(counts_of(backend, name, case.biased), case.exact)
    assert p > ALPHA, f"{name} on {backend}: the draws are this likely: {p:.1e}"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("zipf", P(temperature=1.1)),
        ("peaked", P(temperature=0.95)),
        ("top_k in ties", P(top_k=4)),
        ("top_p on a boundary", P(top_p=_ABOVE)),
        ("min_p just passed", P(min_p=0.5001)),
        ("min_p just missed", P(min_p=0.4999)),
        ("top_p of what top_k left", P(top_p=0.7)),
        ("bias", P()),
    ],
)
def test_draws_from_a_distribution_a_little_beside_it_are_noticed(name: str, wrong: SamplingParams) -> None:
    assert g_test(counts_of("cpu_reference", name, wrong), CASES[name].exact) < ALPHA


def test_the_exact_distributions_are_those_of_the_page() -> None:
    """Of boundary cases, by hand."""
    chances = {name: sorted(p for p in CASES[name].exact if p) for name in CASES}
    of = Fraction
    assert chances["top_k in ties"] == [of(4, 17), of(4, 17), of(9, 17)]
    assert CASES["top_k in ties"].exact[max(ids_of(1, 2, 3, 4))] == 0, "of equals the lower ids stay"
    assert chances["top_p on a boundary"] == [of(1, 4)] * 4
    assert chances["top_p on the next boundary"] == chances["top_p after a boundary"] == [of(1, 5)] * 5
    assert chances["top_p that leaves one"] == chances["one allowed"] == chances["top_k of one"] == [of(1)]
    assert chances["min_p of one in ties"] == [of(1, 3)] * 3
    assert chances["min_p just passed"] == [of(1, 4), of(1, 4), of(1, 2)]
    assert chances["min_p just missed"] == [of(1)]
    with pytest.raises(ValueError, match="too near"):
        exact((2, 1, 1), P(top_p=0.5))
    with pytest.raises(ValueError, match="too near"):
        exact((2, 1), P(min_p=0.5))


KEYS: dict[str, Callable[[npt.NDArray[np.uint64]], dict[str, Any]]] = {
    "seed": lambda k: {"seed": k},
    "high word of the seed": lambda k: {"seed": k << np.uint64(32)},
    "position": lambda k: {"position": k.astype(np.int32)},
    "choice": lambda k: {"choice": k.astype(np.int32)},
}


@pytest.mark.parametrize("axis", KEYS)
def test_neighbouring_keys_give_independent_draws(axis: str) -> None:
    n = ROWS + 1
    keys = KEYS[axis](np.arange(n, dtype=np.uint64))
    sampling = repeated(batch_of([Draw(P(), 7)], 8), n, **keys)
    drawn = sample(np.zeros((n, 8), np.float32), sampling).tokens
    pairs = np.bincount(drawn[:-1] * 8 + drawn[1:], minlength=64)
    assert g_test(pairs, [Fraction(1, 64)] * 64) > ALPHA
    assert g_test(np.bincount(drawn, minlength=8), [Fraction(1, 8)] * 8) > ALPHA


LIKELY = np.log(np.array([40, 30, 20, 15, 14, *[1] * (V - 5)])).astype(np.float32)
"""Logits of which the largest are what a mask takes away, or lie at its edge."""
MASKS: dict[str, tuple[SamplingParams, set[int]]] = {
    "top_k": (P(top_k=4), {0, 1, 2, 3}),
    "top_p": (P(top_p=0.45), {0, 1, 2}),
    "min_p": (P(min_p=0.6), {0, 1}),
    "allowed_token_ids": (P(allowed_token_ids=(3, 31, 32, 63)), {3, 31, 32, 63}),
    "logit_bias": (P(logit_bias={0: -inf, 5: -inf, 33: -inf}), set(range(V)) - {0, 5, 33}),
    "min_tokens": (P(min_tokens=2, stop_token_ids=(4, 40)), set(range(V)) - {EOS, 4, 40}),
    "bad_words_ids": (P(bad_words_ids=((2,), (7,))), set(range(V)) - {2, 7}),
}
"""Parameters that mask, and the ids that they leave."""


def drawn_under(mask: str, seeds: npt.NDArray[np.uint64], backend: str) -> set[int]:
    """The ids that were drawn from LIKELY, a draw from each seed."""
    sampling = repeated(batch_of([Draw(MASKS[mask][0], 0)], V), ROWS, seed=seeds)
    tokens = masked_drawer(backend).draw(np.zeros(ROWS, np.int32), sampling).tokens
    return set(np.flatnonzero(np.bincount(tokens, minlength=V)).tolist())


@cache
def masked_drawer(backend: str) -> Drawer:
    return Drawer(backend, LIKELY[None], ROWS)


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_token_is_not_drawn_in_a_hundred_thousand_draws(mask: str) -> None:
    found: set[int] = set()
    for turn in range(7):
        seeds = np.arange(turn * ROWS, (turn + 1) * ROWS, dtype=np.uint64)
        found |= drawn_under(mask, seeds, BACKENDS[turn % len(BACKENDS)])
    assert found == MASKS[mask][1]


@pytest.mark.slow
@ON_EVERY_BACKEND
@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_token_is_not_drawn_in_ten_million_draws(backend: str, mask: str) -> None:
    """Of each mask, on each backend: a token that is drawn once in a million times would be seen."""
    found: set[int] = set()
    for turn in range(-(-10_000_000 // ROWS)):
        seeds = np.arange(turn * ROWS, (turn + 1) * ROWS, dtype=np.uint64) << np.uint64(20)
        found |= drawn_under(mask, seeds, backend)
    assert found == MASKS[mask][1]


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("mask", MASKS)
def test_the_least_and_the_greatest_random_word_draw_no_masked_token(
    mask: str, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masked ids get the greatest noise, all others the least, and the other way round."""
    params, permitted = MASKS[mask]
    greatest = np.isin(np.arange(V), list(permitted), invert=word > 0)

    def words(counter: npt.NDArray[np.uint32], key: Any) -> npt.NDArray[np.uint32]:
        return np.where(greatest, np.uint32(0xFFFFFFFF), np.uint32(0)).astype(np.uint32).reshape(-1, 4)

    monkeypatch.setattr(reference, "philox", words)
    assert np.isfinite(reference.gumbel(0, 0, 0, V)).all()
    assert sample(LIKELY[None], batch_of([Draw(params, 0)], V)).tokens[0] in permitted


@pytest.mark.parametrize("temperature", [1e7, 1e39, inf, float("nan"), -1.0])
def test_temperatures_at_which_float32_gives_out_are_refused(temperature: float) -> None:
    with pytest.raises(RequestError, match="temperature"):
        P(temperature=temperature)


@pytest.mark.parametrize(("temperature", "wanted"), [(MIN_TEMPERATURE, {1}), (MAX_TEMPERATURE, {0, 1, 2})])
@pytest.mark.parametrize(
    "cut", [{"top_p": 0.9}, {"min_p": 0.1}, {"allowed_token_ids": (0, 1, 2)}, {"top_k": 3}]
)
def test_great_logits_stay_apart_at_the_extreme_temperatures(
    temperature: float, wanted: set[int], cut: dict[str, Any]
) -> None:
    logits = np.array([[-3e4, 3e4, -3e4, *[-1e30] * 5]], np.float32)
    sampling = repeated(batch_of([Draw(P(temperature=temperature, **cut), 0)], 8), 400, seed=np.arange(400))
    assert set(sample(np.repeat(logits, 400, axis=0), sampling).tokens.tolist()) == wanted
