"""A request's output is its own: the same alone, in company, in chunks, after a preemption, from the prefix
cache and with steps in flight.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from core.sampling.params import SamplingParams
from core.scheduler import Request
from tests.scheduler.profiles import KINDS, MIXED, PROFILES, RECTANGLE, Kinds, Profile
from tests.scheduler.simulator import VOCAB, World

Outputs = dict[str, dict[int, list[int]]]


@cache
def requests(max_len: int) -> tuple[Request, ...]:
    """Six requests, some with choices, ends of their own, and common beginnings."""
    r = random.Random(7)
    made = []
    for i in range(6):
        prompt = tuple(j % 5 for j in range(max_len * 7 // 8)) * (i % 2)
        prompt += tuple(r.randrange(VOCAB) for _ in range(1 + r.randrange(max_len // 16)))
        params = SamplingParams(n=1 + i % 3, max_tokens=5 + 4 * i)
        made.append(
            Request(request_id=str(i), prompt_ids=prompt, params=params, eos_ids=(i,), seed=r.getrandbits(60))
        )
    return tuple(made)


def together(world: World, *, tag: str = "") -> Outputs:
    """Outputs by request and choice where all requests come at once."""
    wanted = requests(world.profile.max_len)
    for request in wanted:
        world.add(replace(request, request_id=request.request_id + tag))
    world.run()
    return {r.request_id: world.clients[r.request_id + tag].outputs for r in wanted}


@cache
def alone(profile: Profile, kinds: Kinds) -> Outputs:
    """Outputs where each choice of each request has the engine to itself, a step at a time."""
    outputs: Outputs = {}
    for request in requests(profile.max_len):
        world = World(profile, kinds, depth=1)
        world.add(request)
        world.run()
        outputs[request.request_id] = world.clients[request.request_id].outputs
    return outputs


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
class TestOutputsAreThoseOfTheRequestAlone:
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_in_company(self, profile: Profile, kinds: Kinds, depth: int) -> None:
        world = World(profile, kinds, depth=depth)
        assert together(world) == alone(profile, kinds)
        assert world.scheduler.counters.preemptions == 0

    @pytest.mark.parametrize("depth", [1, 2])
    def test_from_the_prefix_cache(self, profile: Profile, kinds: Kinds, depth: int) -> None:
        world = World(profile, kinds, depth=depth)
        together(world)
        before = world.scheduler.counters.cached_tokens
        assert together(world, tag=" again") == alone(profile, kinds)
        assert world.scheduler.counters.cached_tokens > before

    @pytest.mark.parametrize("depth", [1, 2])
    def test_after_preemptions(self, profile: Profile, kinds: Kinds, depth: int) -> None:
        world = World(profile, kinds, depth=depth)
        wanted = [world.add(request) for request in requests(profile.max_len)]
        for i in range(world.bound()):
            if not world.step():
                break
            running = [s for sequences in wanted for s in sequences if s.slot >= 0]
            if i % 4 == 3 and running:
                world.preempt(running[i % len(running)])
        assert {name: client.outputs for name, client in world.clients.items()} == alone(profile, kinds)
        assert world.scheduler.counters.preemptions > 2


@pytest.mark.parametrize("depth", [1, 2])
def test_in_chunks(depth: int) -> None:
    for chunk in (6, 7, 16):
        profile = replace(MIXED, max_tokens=chunk)
        world = World(profile, KINDS["all"], depth=depth)
        assert together(world) == alone(MIXED, KINDS["all"])
        assert world.chunks > 5


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("profile", [MIXED, RECTANGLE], ids=lambda p: p.name)
def test_where_blocks_run_out(profile: Profile, depth: int) -> None:
    world = World(profile, KINDS["full"], depth=depth, tight=True)
    assert together(world) == alone(profile, KINDS["full"])
    assert world.scheduler.counters.preemptions > 0
