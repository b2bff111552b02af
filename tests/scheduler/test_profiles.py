"""The scheduler under constraint profiles: it starves nobody, breaks no declared rule, computes the right
thing and gives everything back.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from core.contract.errors import RequestError
from tests.scheduler.profiles import KINDS, PROFILES, Kinds, Profile
from tests.scheduler.simulator import World


def run(profile: Profile, kinds: Kinds, seed: int, *, depth: int, tight: bool, requests: int = 14) -> World:
    """A world with random arrivals, aborts and cancellations, run to its end."""
    world = World(profile, kinds, depth=depth, seed=seed, tight=tight)
    r = random.Random(seed)
    most = min(profile.max_requests, profile.spec.batch.max_requests or profile.max_requests)
    running = []
    for _ in range(requests):
        while r.random() < 0.6:
            world.step()
        if running and r.random() < 0.2:
            world.abort(r.choice(running)[0].request.request_id)
        if running and r.random() < 0.2:
            world.cancel(r.choice(r.choice(running)))
        try:
            running.append(world.add(world.random_request(r, max_n=most)))
        except RequestError as error:
            assert tight and "do not fit the KV cache" in str(error)
    world.run()
    world.check_end()
    return world


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("seeds", [(0, 1), pytest.param(range(2, 10), marks=pytest.mark.slow)], ids=len)
def test_random_load_keeps_every_rule(
    profile: Profile, kinds: Kinds, tight: bool, seeds: Sequence[int]
) -> None:
    for seed in seeds:
        run(profile, kinds, seed, depth=1 + seed % 2, tight=tight)
