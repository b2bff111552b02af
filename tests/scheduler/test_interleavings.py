"""Every interleaving, at small size, of stop, abort, cancel and preemption with scheduling and waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, islice, product

import pytest

from core.sampling.params import SamplingParams
from core.scheduler import Request
from tests.scheduler.profiles import KINDS, MIXED
from tests.scheduler.simulator import World, alone

LENGTH = 6
SMALL = replace(
    MIXED,
    spec=replace(MIXED.spec, cache=replace(MIXED.spec.cache, block_sizes=(4,))),
    max_requests=2,
    max_tokens=8,
    max_len=24,
    window=5,
)
ACTIONS = ("abort a", "cancel a", "preempt a", "preempt b")


@cache
def requests() -> tuple[Request, ...]:
    """`a` stops at its second token, `b` at its length; `c` waits for a slot and continues what `a` says."""
    a = Request(request_id="a", prompt_ids=(1, 2, 3, 4, 5), params=SamplingParams(max_tokens=8), seed=5)
    said = alone(a, 0, SMALL.max_len).tokens.tolist()
    assert said[5] != said[6]
    b = Request(request_id="b", prompt_ids=(6,) * 6, params=SamplingParams(max_tokens=5), seed=2)
    c = Request(request_id="c", prompt_ids=tuple(said[:14]), params=SamplingParams(max_tokens=3), seed=9)
    return replace(a, eos_ids=(said[6],)), b, c


def words(depth: int, length: int = LENGTH, in_flight: int = 0) -> Iterator[str]:
    """All orders of (s)chedule and (w)ait with at most `depth` steps in flight."""
    if length == 0:
        yield ""
        return
    if in_flight < depth:
        yield from ("s" + rest for rest in words(depth, length - 1, in_flight + 1))
    if in_flight:
        yield from ("w" + rest for rest in words(depth, length - 1, in_flight - 1))


def scripts() -> Iterator[dict[int, list[str]]]:
    """Every one or two actions at every one or two moments; what follows the end of `a` is about `b`."""
    for moment, action in product(range(LENGTH + 1), ACTIONS):
        yield {moment: [action]}
    for one, other in combinations_with_replacement(range(LENGTH + 1), 2):
        for first, second in product(ACTIONS, repeat=2):
            if first.startswith("preempt") or second.endswith("b"):
                yield {one: [first, second]} if one == other else {one: [first], other: [second]}


def play(word: str, script: dict[int, list[str]], depth: int) -> World:
    """A world in which the word is followed, and the script at its moments; then run to its end."""
    world = World(SMALL, KINDS["all"], depth=depth, seed=len(word))
    sequences = {request.request_id: world.add(request)[0] for request in requests()}
    for moment in range(len(word) + 1):
        for action in script.get(moment, ()):
            verb, name = action.split()
            if verb == "abort":
                world.abort(name)
            elif verb == "cancel":
                world.cancel(sequences[name])
            else:
                world.preempt(sequences[name])
        if word[moment : moment + 1] == "s":
            world.schedule()
        elif word[moment : moment + 1] == "w":
            world.wait()
            world.check_cached()
    world.run()
    world.check_end()
    return world


@pytest.mark.parametrize(
    ("depth", "every"), [(1, 1), (2, 7), pytest.param(2, 1, marks=pytest.mark.slow)], ids=str
)
def test_every_interleaving_emits_and_caches_nothing_surplus(depth: int, every: int) -> None:
    """Of two steps in flight a seventh of the cases, each word with other scripts, where time is short."""
    surplus = stopped = 0
    for i, word in enumerate(words(depth)):
        for script in islice(scripts(), i % every, None, every):
            world = play(word, script, depth)
            surplus += world.scheduler.counters.surplus_tokens
            stopped += world.clients["a"].reasons[0] == "stop"
    assert surplus and stopped, "the interleavings never met what they are about"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_step_in_flight_when_its_request_stops_is_dropped(depth: int) -> None:
    world = play("", {}, depth)
    assert world.clients["a"].reasons == {0: "stop"}
    assert (world.scheduler.counters.surplus_tokens > 0) == (depth > 1)
