"""Rules of the scheduler, one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.block_manager import BlockManager
from core.contract.errors import ConfigError, RequestError
from core.contract.types import CachePlan
from core.sampling.params import SamplingParams
from core.scheduler import Request, Scheduler, SchedulerConfig, Sequence, Status
from tests.scheduler.profiles import EITHER, KINDS, LARGE, MIXED, RECTANGLE, Profile, make_plan
from tests.scheduler.simulator import World


def request(name: str, tokens: int = 5, *, n: int = 1, outputs: int = 4, **fields: object) -> Request:
    """A request whose prompt no other one shares."""
    prompt = (len(name), *name.encode()[: tokens - 1], *range(tokens - 1 - len(name)))[:tokens]
    params = SamplingParams(n=n, max_tokens=outputs)
    return Request(request_id=name, prompt_ids=prompt, params=params, **fields)  # type: ignore[arg-type]


def with_blocks(profile: Profile, kinds: str, group: int, blocks: int) -> CachePlan:
    """The profile's plan with another size of one pool."""
    plan = make_plan(profile, KINDS[kinds], tight=False)
    groups = list(plan.groups)
    groups[group] = replace(groups[group], num_blocks=blocks)
    return replace(plan, groups=tuple(groups))


def order_of_ends(world: World) -> list[str]:
    """Request ids in the order in which they end."""
    ended: list[str] = []
    while world.step():
        ended += [name for name, client in world.clients.items() if client.reasons and name not in ended]
    return ended + [name for name in world.clients if name not in ended]


# Blocks


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("profile", [MIXED, EITHER, LARGE, RECTANGLE], ids=lambda p: p.name)
def test_one_sequence_gets_on_in_the_smallest_window_pool(profile: Profile, depth: int) -> None:
    """Prompts are longer than the pool; chunks are cut to it, and blocks come back as the window moves on."""
    for blocks in range(2, 20):
        world = World(profile, depth=depth, plan=with_blocks(profile, "full and window", 1, blocks))
        try:
            world.add(request("a", profile.max_len * 3 // 4, outputs=profile.max_len))
        except RequestError:
            continue
        assert (blocks - 1) * profile.block // 2 < profile.max_len
        world.run()
        world.check_end()
        assert world.scheduler.counters.preemptions == 0
        return
    raise AssertionError("no pool was large enough")


def test_the_last_to_come_gives_its_blocks_back() -> None:
    world = World(MIXED, depth=2, tight=True)
    first = [world.add(request(name, 10, outputs=70))[0] for name in "abc"]
    assert order_of_ends(world) == ["a", "b", "c"]
    world.check_end()
    assert [s.num_preemptions > 0 for s in first] == [False, True, True]


def run_until_short(depth: int) -> tuple[World, Sequence]:
    """`a` needs a third block of three, so `b` lost its one; it comes when the steps in flight are done."""
    world = World(EITHER, depth=depth, plan=with_blocks(EITHER, "full", 0, 1 + 3))
    world.add(request("a", 250, outputs=100))
    b = world.add(request("b", 100, outputs=20))[0]
    while not b.num_preemptions:
        world.step()
    return world, b


def test_the_first_in_the_order_gets_the_last_block() -> None:
    """`a` came after `b` but goes before it; both need a block, one is free, those of `c` are fenced."""
    world = World(MIXED, depth=2, plan=with_blocks(MIXED, "full", 0, 1 + 4))
    world.add(request("b", 13, outputs=20, priority=1))
    world.schedule()
    a = world.add(request("a", 14, outputs=20))[0]
    world.add(request("c", 5, outputs=20, priority=2))
    for _ in range(3):
        world.schedule()
        world.wait()
    world.abort("c")
    assert world.schedule()
    assert [row.sequence for row in world.device.flights[-1].rows] == [a]
    world.run()
    world.check_end()


@pytest.mark.parametrize("depth", [2, 3])
def test_newcomers_wait_while_a_running_sequence_is_short_of_blocks(depth: int) -> None:
    world, b = run_until_short(depth)
    world.run()
    world.check_end()
    assert b.num_preemptions == 1


@pytest.mark.parametrize("depth", [2, 3])
def test_waiting_sequences_start_as_soon_as_the_short_one_is_gone(depth: int) -> None:
    world, b = run_until_short(depth)
    world.abort("a")
    while world.device.flights:
        world.wait()
    assert world.schedule() and b.status is Status.DECODE
    world.run()
    world.check_end()


# Rows and tokens


@pytest.mark.parametrize("depth", [1, 2])
def test_choices_that_would_exceed_the_rows_of_a_step_wait(depth: int) -> None:
    """The prompt's last chunk samples a row per choice, and all of them count."""
    world = World(LARGE, depth=depth)
    world.add(request("a", n=2, outputs=12))
    world.add(request("b", n=3, outputs=3))
    world.step()
    assert [client.outputs != {} for client in world.clients.values()] == [True, False]
    world.run()
    world.check_end()


def test_a_long_prompt_gets_on_in_a_stream_of_short_requests() -> None:
    """Chunks of 32 tokens and at most 34 in a step: with three decoding rows, none fits. Newcomers must not
    pass.
    """
    rules = replace(MIXED.spec.batch, prefill_multiple=32)
    world = World(replace(MIXED, spec=replace(MIXED.spec, batch=rules), max_tokens=34), depth=1)
    long = None
    for i in range(150):
        world.add(request(f"short {i}", 2, outputs=6))
        if i == 10:
            long = world.add(request("long", 70, outputs=2))[0]
        world.step()
        if long is not None and long.status is Status.FINISHED:
            break
    assert long is not None and long.status is Status.FINISHED
    assert world.scheduler.counters.steps < 90
    world.run()
    world.check_end()


def test_rows_beyond_the_cap_take_turns() -> None:
    world = World(RECTANGLE, depth=1)
    for name in "abcdef":
        world.add(request(name, 130, outputs=60))
    world.run()
    world.check_end()
    assert 0 < world.longest_wait <= 2 * MIXED.max_requests


def test_prefill_and_decode_steps_alternate_where_they_may_not_mix() -> None:
    world = World(EITHER, depth=1)
    kinds = []
    schedule = world.scheduler.schedule
    world.add(request("a", outputs=20))
    world.step()
    for name in "bcd":
        world.add(request(name, 190))
    for _ in range(6):
        plan = schedule()
        assert plan is not None
        kinds.append(plan.kind)
        world.scheduler.update(plan.step_id, np.zeros(len(plan.decode) + len(_samples(plan)), np.int32))
    assert kinds == ["decode", "prefill"] * 3


def _samples(plan: object) -> list[int]:
    return [slot for row in plan.prefills for slot in row.samples]  # type: ignore[attr-defined]


# Choices of one request


def test_choices_share_the_prompt_and_are_independent() -> None:
    world = World(MIXED, KINDS["all"], depth=2)
    world.add(request("a", 40, n=4, outputs=20))
    world.run()
    world.check_end()
    assert world.scheduler.counters.scheduled_tokens < 2 * 40 + 4 * 20
    assert len({tuple(output) for output in world.clients["a"].outputs.values()}) == 4


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 0), (0, 1, 2)])
def test_cancelled_choices_stay_ended_and_the_others_go_on(
    which: tuple[int, ...], moment: int, depth: int
) -> None:
    """Whether the request waits, computes its prompt, was preempted, or decodes."""
    for preempt in (False, True):
        world = World(replace(MIXED, max_tokens=16), KINDS["all"], depth=depth)
        choices = world.add(request("a", 40, n=3, outputs=5))
        for _ in range(moment):
            world.schedule()
            if moment > depth:
                world.wait()
        if preempt:
            world.preempt(choices[0])
        for i in which:
            world.cancel(choices[i])
        world.run()
        world.check_end()
        for i, reason in world.clients["a"].reasons.items():
            assert reason == ("cancel" if i in which else "length")


# Order, deadlines, ends


def test_lower_priorities_go_first_only_under_that_policy() -> None:
    requests = [request(name, priority=priority) for name, priority in (("a", 2), ("b", 1), ("c", 0))]
    for policy, wanted in (("priority", ["c", "b", "a"]), ("fcfs", ["a", "b", "c"])):
        scheduler = make(SchedulerConfig(max_requests=1, max_model_len=32, policy=policy))  # type: ignore[arg-type]
        for item in requests:
            scheduler.add(item)
        assert drain(scheduler) == wanted


def make(config: SchedulerConfig, profile: Profile = MIXED) -> Scheduler:
    """A scheduler without a device."""
    groups = [g for g in World(profile, depth=1).blocks.groups if g.kind == "paged"]
    blocks = BlockManager(groups, max_requests=config.max_requests, max_model_len=config.max_model_len)
    return Scheduler(config, profile.spec.batch, blocks)


def drain(scheduler: Scheduler) -> list[str]:
    """Run to the end, a step at a time; ids in the order of their ends."""
    ended: list[str] = []
    while (plan := scheduler.schedule()) is not None:
        tokens = np.zeros(len(plan.decode) + len(_samples(plan)), np.int32)
        ended += [e.sequence.request.request_id for e in scheduler.update(plan.step_id, tokens) if e.finished]
    return ended


def test_a_queue_deadline_ends_only_what_has_not_started() -> None:
    world = World(replace(MIXED, max_requests=1), depth=1)
    running = world.add(request("a", outputs=30, queue_deadline=5.0))[0]
    waiting = world.add(request("b", queue_deadline=5.0))[0]
    while world.now < 4:
        world.step()
    assert waiting.status is Status.WAITING
    world.step()
    assert (waiting.finish_reason, world.clients["b"].outputs) == ("deadline", {0: []})
    world.run()
    world.check_end()
    assert running.finish_reason == "length"


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    world = World(replace(MIXED, max_requests=1), depth=2)
    sequences = [world.add(request(name, outputs=30, deadline=6.0))[0] for name in "ab"]
    while world.now < 6:
        world.step()
    assert [s.finish_reason for s in sequences] == ["deadline", "deadline"]
    assert len(sequences[0].output_ids) > 1 and not sequences[1].output_ids
    world.run()
    world.check_end()


def test_a_preempted_sequence_has_started_already() -> None:
    world = World(replace(MIXED, max_requests=1), depth=1)
    sequence: Sequence = world.add(request("a", outputs=30, queue_deadline=3.0))[0]
    world.step()
    world.preempt(sequence)
    world.now = 9.0
    world.run()
    world.check_end()
    assert sequence.finish_reason == "length" and sequence.num_preemptions == 1


def test_ends_and_their_reasons() -> None:
    world = World(MIXED, depth=2)
    token = world.add(request("probe"))[0]
    world.run()
    first = token.output_ids[0]
    stop = SamplingParams(max_tokens=4, stop_token_ids=(first,))
    ignore = SamplingParams(max_tokens=4, ignore_eos=True)
    eos = world.add(replace(request("probe"), request_id="eos", eos_ids=(first,)))[0]
    stopped = world.add(replace(request("probe"), request_id="stop", params=stop))[0]
    ignored = world.add(replace(request("probe"), request_id="ignore", eos_ids=(first,), params=ignore))[0]
    full = world.add(request("full", MIXED.max_len - 2, outputs=10))[0]
    world.run()
    world.check_end()
    ends = [(s.finish_reason, s.stop_reason, len(s.output_ids)) for s in (eos, stopped, ignored, full)]
    assert ends == [("stop", None, 1), ("stop", first, 1), ("length", None, 4), ("length", None, 2)]


def test_abort_knows_live_requests_only() -> None:
    world = World(MIXED, depth=1)
    world.add(request("a"))
    assert world.scheduler.abort("a") and not world.scheduler.abort("a")
    assert not world.scheduler.abort("b")
    assert [event.finished for event in world.scheduler.take_events()] == [True]
    world.add(replace(request("a"), params=SamplingParams(max_tokens=2)))
    world.run()
    world.check_end()


# Refusals


def test_requests_that_can_never_run_are_refused_and_nothing_is_queued() -> None:
    world = World(MIXED, depth=1, plan=with_blocks(MIXED, "full", 0, 4))
    refused = {
        "it must have 1 to 89": request("a", 90),
        "lower n": request("b", n=7),
        "do not fit the KV cache": request("c", 40, outputs=9),
    }
    for message, item in refused.items():
        with pytest.raises(RequestError, match=message):
            world.scheduler.add(item)
    assert not world.scheduler.has_work
    with pytest.raises(RequestError, match="it must have 1 to 89"):
        world.scheduler.add(replace(request("d"), prompt_ids=()))
    world.add(request("e", 40, outputs=8))
    with pytest.raises(RequestError, match="'e' is in use"):
        world.scheduler.add(request("e"))
    world.run()
    world.check_end()


def test_a_chunk_that_never_fits_a_window_pool_is_refused() -> None:
    """The smallest chunk is 64 tokens: with what the window sees, five blocks of 32."""
    for blocks in range(3, 10):
        world = World(RECTANGLE, depth=2, plan=with_blocks(RECTANGLE, "full and window", 1, blocks))
        try:
            world.add(request("a", 200, outputs=50))
        except RequestError as error:
            assert blocks < 8 and "do not fit the KV cache" in str(error)
        else:
            world.run()
            world.check_end()
    assert world.scheduler.counters.steps


def test_the_queue_is_bounded() -> None:
    scheduler = make(SchedulerConfig(max_requests=1, max_model_len=32, max_waiting=2))
    for name in "ab":
        scheduler.add(request(name))
    with pytest.raises(RequestError, match="2 requests are waiting"):
        scheduler.add(request("c"))
    assert scheduler.abort("a")
    scheduler.add(request("c"))
    assert scheduler.num_waiting == 2 and drain(scheduler) == ["a", "b", "c"]


def test_limits_that_contradict_the_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="lower max_model_len to at most 256"):
        make(SchedulerConfig(max_requests=2, max_model_len=257), RECTANGLE)
    with pytest.raises(ConfigError, match="multiples of 64 tokens"):
        make(SchedulerConfig(max_requests=2, max_model_len=128, max_batch_tokens=63), RECTANGLE)


def test_results_are_taken_in_order_and_whole() -> None:
    scheduler = make(SchedulerConfig(max_requests=2, max_model_len=32))
    scheduler.add(request("a"))
    assert scheduler.oldest_step is None
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert (scheduler.oldest_step, scheduler.num_in_flight) == (first.step_id, 2)
    with pytest.raises(ValueError, match="step 1 is not the oldest"):
        scheduler.update(second.step_id, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="sampled 1 rows but gave 2 tokens"):
        scheduler.update(first.step_id, np.zeros(2, np.int32))
    assert [e.token for e in scheduler.update(first.step_id, np.array([7], np.int32))] == [7]
