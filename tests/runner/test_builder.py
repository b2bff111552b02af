"""The batch builder: fields and padding of every kind of bucket, whatever the host buffer held before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from core.contract.types import Outputs
from core.runner import builder as builder_module
from core.runner.builder import BatchBuilder
from core.sampling.params import SamplingParams
from core.scheduler import Request, StepPlan
from tests.scheduler.profiles import KINDS, MIXED, PROFILES, STATIC, Kinds, Profile
from tests.scheduler.simulator import World


def make(profile: Profile, kinds: Kinds, depth: int) -> World:
    """A world with requests whose chunks and choices make every kind of step that the profile allows."""
    world = World(profile, kinds, depth=depth)
    quarter = profile.max_len // 4
    for i, (tokens, n) in enumerate(((1, 2), (quarter, 1), (3 * quarter, 1), (2, 1), (2 * quarter, 3))):
        world.add(
            Request(
                request_id=str(i),
                prompt_ids=tuple((i + j) % 11 for j in range(tokens)),
                params=SamplingParams(n=n, max_tokens=4 + i),
                seed=i,
            )
        )
    return world


def dirty_buffers(world: World, patch: pytest.MonkeyPatch) -> None:
    """Before each build, every element of its buffer is filled with a number that belongs nowhere."""
    build = BatchBuilder.build

    def patched(self: BatchBuilder, step: StepPlan, *args: Any) -> Any:
        self._buffers[step.step_id % len(self._buffers)][:] = -123_456
        return build(self, step, *args)

    patch.setattr(BatchBuilder, "build", patched)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_every_field_is_set_and_padded_in_every_kind_of_bucket(
    profile: Profile, kinds: Kinds, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The world checks each batch: padding by the contract's table, real entries by what they lead to."""
    world = make(profile, kinds, depth)
    dirty_buffers(world, monkeypatch)
    world.run()
    world.check_end()
    met = {bucket.kind for bucket in world.shapes}
    assert met == ({"decode", "prefill", "mixed"} if profile.spec.batch.mixed else {"decode", "prefill"})


def test_static_buckets_that_are_met_are_few() -> None:
    """Their number is bounded by the ladder, not by the load."""
    world = make(STATIC, KINDS["all"], 2)
    world.run()
    shapes = STATIC.spec.shapes
    decode = {bucket for bucket in world.shapes if bucket.kind == "decode"}
    assert decode <= set(world.buckets.warm_up())
    assert all(bucket.max_query in shapes.token_buckets for bucket in world.shapes - decode)


def test_buffers_are_used_in_turn() -> None:
    world = make(MIXED, KINDS["full"], 2)
    buffers = world.builder._buffers
    for step in range(5):
        plan = world.scheduler.schedule()
        assert plan is not None and plan.step_id == step
        batch = world.builder.build(plan)
        assert [np.shares_memory(batch.flat, buffer) for buffer in buffers] == [
            i == step % 3 for i in range(3)
        ]
        world.scheduler.update(step, np.zeros(batch.num_samples, np.int32))


def test_layouts_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_module, "_MAX_LAYOUTS", 3)
    world = make(MIXED, KINDS["all"], 2)
    world.run()
    world.check_end()
    assert len(world.shapes) > 6 and len(world.builder._layouts) <= 3


def test_wanted_outputs_are_part_of_the_bucket() -> None:
    world = make(MIXED, KINDS["full"], 1)
    plan = world.scheduler.schedule()
    assert plan is not None
    assert world.builder.build(plan).bucket.outputs == Outputs()
    assert world.builder.build(plan, Outputs(all_logits=True)).bucket.outputs.all_logits


def test_sampling_parameters_follow_their_rows() -> None:
    """Decode rows first, then each prompt's choices; a prompt that goes on samples nothing."""
    world = World(MIXED, depth=1)
    wanted = {}
    for i, n in enumerate((1, 2)):
        params = SamplingParams(
            n=n, temperature=0.5 + i, top_k=3 + i, top_p=0.25 + i / 2, min_p=i / 8, max_tokens=9
        )
        request = Request(request_id=str(i), prompt_ids=(1,) * (4 + i), params=params, seed=2**63 + i)
        wanted[i] = (0.5 + i, 3 + i, 0.25 + i / 2, i / 8, 2**63 + i)
        world.add(request)
        plan = world.scheduler.schedule()
        assert plan is not None
        batch, sampling = world.builder.build(plan), world.builder.sampling(plan)
        world.scheduler.update(plan.step_id, np.zeros(batch.num_samples, np.int32))
    rows = zip(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed, strict=True
    )
    assert [tuple(row) for row in rows] == [wanted[0], wanted[1], wanted[1]]
    assert sampling.choice.tolist() == [0, 0, 1]
    assert sampling.position.tolist() == [5, 5, 5]
    assert batch.sample_rows[:3].tolist() == [0, 5, 5]
