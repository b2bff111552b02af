"""Every sampler repeats the known answers, and the committed file is what the reference writes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from core.sampling.reference import gumbel, sample
from tests.backends.harness import BACKENDS
from tests.sampling import vectors
from tests.sampling.drawing import Draw, Drawer, batch_of
from tests.sampling.vectors import MARGIN, Set

VOCABULARIES = sorted({one.vocab for one in vectors.SETS})


@cache
def sets_of(vocab: int) -> list[Set]:
    """The committed sets of a vocabulary."""
    return [one for one in vectors.read() if one.vocab == vocab]


def draws_of(one: Set) -> list[Draw]:
    return [Draw(one.sampling_params, *key) for *key, _ in one.draws]


def tokens_of(one: Set) -> list[int]:
    return [token for *_, token in one.draws]


def test_the_file_is_what_the_reference_writes() -> None:
    assert vectors.main(["--check"]) == 0, "python -m tests.sampling.vectors --write, if that was meant"


def test_the_file_covers_every_step_of_a_draw() -> None:
    sets = vectors.read()
    assert len(sets) == len(vectors.SETS) and all(len(one.draws) == vectors.DRAWS for one in sets)
    named = {name for one in sets for name in one.params}
    assert named >= {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "logit_bias",
        "allowed_token_ids",
        "min_tokens",
    }
    seeds, positions, choices, _ = zip(*(draw for one in sets for draw in one.draws), strict=True)
    assert max(seeds) >= 2**63 and max(positions) > 2**16 and max(choices) > 1
    for one in sets:
        for name in one.params.keys() - {"max_tokens"}:
            others = {key: value for key, value in one.params.items() if key != name}
            ignored = replace(one, params=others).sampling_params
            anew = [Draw(ignored, *key) for *key, _ in one.draws]
            found = sample(np.tile(one.logits, (vectors.DRAWS, 1)), batch_of(anew, one.vocab)).tokens
            assert found.tolist() != tokens_of(one), f"{name} of {one.params} changes no draw"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_sampler_repeats_them_all_in_one_batch_and_set_by_set(backend: str, vocab: int) -> None:
    sets = sets_of(vocab)
    draws = [draw for one in sets for draw in draws_of(one)]
    drawer = Drawer(backend, np.stack([one.logits for one in sets]), len(draws))
    which = np.repeat(np.arange(len(sets), dtype=np.int32), vectors.DRAWS)
    found = drawer.draw(which, batch_of(draws, vocab)).tokens.reshape(len(sets), -1)
    for i, one in enumerate(sets):
        assert found[i].tolist() == tokens_of(one), f"{one.params} among others"
        alone = drawer.draw(np.full(vectors.DRAWS, i, np.int32), batch_of(draws_of(one), vocab)).tokens
        assert alone.tolist() == tokens_of(one), f"{one.params} alone"


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_logits_that_are_off_by_the_margin_give_the_same_tokens(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for one in sets_of(vocab):
        if one.ties:
            continue
        batch = batch_of(draws_of(one), vocab)
        for _ in range(8):
            off = rng.choice([-MARGIN, MARGIN], (vectors.DRAWS, vocab)) * 0.99
            moved = (np.tile(one.logits, (vectors.DRAWS, 1)) + off).astype(np.float32)
            assert sample(moved, batch).tokens.tolist() == tokens_of(one)


def test_the_noise_of_a_known_key_is_known() -> None:
    """By Philox's published answer for a counter of zeros and a key of zeros."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.float64)
    exact = -np.log(-np.log1p(-(words + 0.5) * 2.0**-32))
    assert np.abs(gumbel(0, 0, 0, 4) - exact).max() < 1e-6
