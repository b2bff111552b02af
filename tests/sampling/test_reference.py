"""The reference sampler: its random numbers are Philox's, and its draws follow the exact distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.types import SamplingBatch
from core.sampling.reference import allowed, gumbel, philox, sample

Float32 = npt.NDArray[np.float32]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert tuple(philox(np.array([counter], np.uint32), key)[0]) == words


def batch(n: int, **changes: object) -> SamplingBatch:
    """n rows at temperature 1 with seed = row."""
    fields: dict[str, object] = {
        "temperature": np.ones(n, np.float32),
        "top_k": np.zeros(n, np.int32),
        "top_p": np.ones(n, np.float32),
        "min_p": np.zeros(n, np.float32),
        "seed": np.arange(n, dtype=np.uint64) * np.uint64(2**33 + 1),
        "position": np.full(n, 5, np.int32),
        "choice": np.zeros(n, np.int32),
    }
    return SamplingBatch(**{**fields, **changes})


def draws(logits: Float32, n: int, **changes: object) -> npt.NDArray[np.int32]:
    """n draws with different seeds: int32 [n]."""
    tokens: npt.NDArray[np.int32] = sample(np.tile(logits, (n, 1)), batch(n, **changes)).tokens
    return tokens


@pytest.mark.parametrize("name", ["flat", "peaked", "zipf"])
def test_draws_follow_the_softmax(name: str) -> None:
    shapes = {
        "flat": np.zeros(16),
        "peaked": np.array([6.0, *np.zeros(15)]),
        "zipf": -np.log(np.arange(1, 17)),
    }
    logits = shapes[name].astype(np.float32)
    n = 20_000
    counts = np.bincount(draws(logits, n), minlength=16)
    p = np.exp(logits - logits.max())
    expected = n * p / p.sum()
    g = 2 * np.sum(counts * np.log(np.maximum(counts, 1) / expected))
    # Upper 1e-6 quantile of chi-squared with 15 degrees of freedom.
    assert g < 57.2


def test_gumbel_noise_is_finite_and_never_repeats_across_lanes() -> None:
    noise = gumbel(2**63 + 17, 3, 0, 100_000)
    assert np.isfinite(noise).all()
    assert len(np.unique(noise[:1000])) > 990


@pytest.mark.parametrize("changed", ["seed", "position", "choice"])
def test_each_part_of_the_key_changes_the_draw(changed: str) -> None:
    key = {"seed": 1, "position": 2, "choice": 0}
    first = gumbel(key["seed"], key["position"], key["choice"], 64)
    key[changed] += 1
    assert not np.array_equal(first, gumbel(key["seed"], key["position"], key["choice"], 64))


def test_high_words_of_the_seed_count() -> None:
    assert not np.array_equal(gumbel(1, 0, 0, 64), gumbel(1 + 2**32, 0, 0, 64))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 50)).astype(np.float32)
    together = sample(logits, batch(8)).tokens
    for i in range(8):
        alone = batch(8)
        one = SamplingBatch(
            temperature=alone.temperature[i : i + 1],
            top_k=alone.top_k[i : i + 1],
            top_p=alone.top_p[i : i + 1],
            min_p=alone.min_p[i : i + 1],
            seed=alone.seed[i : i + 1],
            position=alone.position[i : i + 1],
            choice=alone.choice[i : i + 1],
        )
        assert sample(logits[i : i + 1], one).tokens[0] == together[i]


def test_temperature_zero_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    assert (draws(logits, 8, temperature=np.zeros(8, np.float32)) == 1).all()


def test_top_k_keeps_lower_ids_of_equal_logits() -> None:
    keep = allowed(np.array([1.0, 2.0, 1.0, 1.0], np.float32), 2, 1.0, 0.0)
    assert keep.tolist() == [True, True, False, False]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.2, 0.05])).astype(np.float32)
    logits[0] += np.float32(1e-6)
    assert allowed(logits, 0, top_p, 0.0).sum() == kept


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1])).astype(np.float32)
    assert allowed(logits, 0, 1.0, 0.4).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": np.full(4000, 2, np.int32)},
        {"top_p": np.full(4000, 0.6, np.float32)},
        {"min_p": np.full(4000, 0.3, np.float32)},
    ],
)
def test_what_is_not_allowed_is_never_drawn(limits: dict[str, object]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.1])).astype(np.float32)
    drawn = set(draws(logits, 4000, **limits).tolist())
    assert drawn == {0, 1}
