"""L2: every op under every choice of its options, in all schedules: rule A, poisons, fused = composite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from conformance.bench import Array, Bench
from conformance.check import Check, Context, Inherited
from conformance.opcases import cached, fused, plain
from conformance.opcases.base import Case
from conformance.subject import Subject, Target
from conformance.world import World
from core.contract.ops import inherited_ops
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec

REFERENCE = "cpu_reference"
POISONS = {"nan": np.nan, "huge": 1e30, "plausible": 0.75}
"""What is put into memory that no live token owns: NaN shows reads that are multiplied, 1e30 those that are
masked by adding, a plausible value those that a test for NaN would hide.
"""


@cache
def oracle() -> Subject:
    """The reference backend."""
    return Subject.of(Target(REFERENCE, "float64"))


def widened(world: World) -> World:
    """The same with caches in float64."""

    def layer(spec: CacheLayerSpec) -> CacheLayerSpec:
        state = tuple(replace(part, dtype="float64") for part in spec.state)
        return replace(spec, dtype="float64", state=state)

    # A size of blocks that the oracle has not is nothing to a result.
    size = world.block_size if world.block_size in oracle().spec.cache.block_sizes else 8
    return replace(world, layers=tuple(layer(spec) for spec in world.layers), block_size=size)


def in_dtype(world: World, dtype: str) -> World:
    """The same with caches in a compute dtype; recurrent states stay in float32."""
    if dtype == "float32":
        return world

    def layer(spec: CacheLayerSpec) -> CacheLayerSpec:
        parts = tuple(p if p.name == "scan" else replace(p, dtype=dtype) for p in spec.state)
        return replace(spec, dtype=dtype, state=parts)

    return replace(world, layers=tuple(layer(spec) for spec in world.layers))


def expected(case: Case, world: World, schedule: str) -> Array:
    """What the oracle gives in float64: [num_tokens, V]."""
    bench = Bench(oracle(), "float64", widened(world), case.inputs, case.fn, exact=True)
    return bench.run(getattr(world, schedule)())


def bench_of(context: Context, case: Case, world: World) -> Bench:
    """The backend under test with a case's inputs."""
    return Bench(context.subject, context.dtype, in_dtype(world, context.dtype), case.inputs, case.fn)


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    blocks = cached.block_cases(sorted(spec.cache.block_sizes))
    seen: set[str] = set()
    for case in (*plain.cases(), *cached.cases(), *blocks, *fused.cases()):
        for schedule in case.schedules:
            yield _check(case, schedule, "rule-a", _rule_a(case, schedule))
        if case.world.layers:
            for poison in POISONS:
                yield _check(case, case.schedules[-1], f"poison-{poison}", _poisoned(case, poison))
        if case.composite is not None:
            yield _check(case, case.schedules[-1], "composite", _composite(case))
        if "x" in case.inputs and case.op not in seen and case.op not in _MOVES:
            seen.add(case.op)
            together = "mixed" if "mixed" in case.schedules else case.schedules[-1]
            yield _check(case, together, "isolated", _isolated(case, together))


_MOVES = ("take",)
"""Ops whose rows are not their own token's."""


def profile_of(op: str) -> str:
    """The claim that an op belongs to."""
    if op in ("route", "experts"):
        return "moe"
    if op in ("short_conv", "state_scan"):
        return "state"
    return "latent" if "latent" in op else "dense"


def _check(case: Case, schedule: str, what: str, run: Callable[[Context], None]) -> Check:
    about = {
        "rule-a": "every element within the theoretical bound of the float64 reference, from the same inputs",
        "composite": "the fused op agrees with the composite of plain ops that defines it",
        "isolated": "what is not a number in one sequence does not reach another",
    }.get(what, "no result depends on memory that no live token of the row owns")
    return Check(
        id=f"L2/{case.op}/{case.name}-{schedule}-{what}",
        run=run,
        about=f"{case.op}, {case.name}, tokens given {schedule}: {about}",
        supported=case.supported,
        profile=profile_of(case.op),
        is_waivable=not what.startswith(("poison", "isolated")),
    )


def _rule_a(case: Case, schedule: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world = case.world.fitted(context.spec)
        found = bench_of(context, case, world).run(getattr(world, schedule)())
        bound = case.exact(context.precision).error
        context.within(found, expected(case, world, schedule), bound, case.op)

    return run


def _poisoned(case: Case, poison: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world, schedule = case.world.fitted(context.spec), case.schedules[-1]
        bench = bench_of(context, case, world)
        for layer in range(len(world.layers)):
            group = world.plan.groups[world.plan.group_of[layer]]
            every = list(range(group.num_blocks))
            parts = bench.allocator.export_blocks(bench.state, layer, every).get()
            values = tuple(np.full_like(part, POISONS[poison]) for part in parts)
            bench.state = bench.allocator.import_blocks(bench.state, layer, every, values)
        found = bench.run(getattr(world, schedule)())
        bound = case.exact(context.precision).error
        context.within(found, expected(case, world, schedule), bound, f"{case.op} in poisoned memory")

    return run


def _isolated(case: Case, schedule: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world = case.world.fitted(context.spec)
        steps = getattr(world, schedule)()
        clean = bench_of(context, case, world).run(steps)
        first, count = (world.first_id(1), world.lengths[1]) if len(world.lengths) > 1 else (1, 1)
        x = case.inputs["x"]
        spoiled = x.array.copy()
        spoiled[first : first + count] = np.nan
        sick = replace(case, inputs={**case.inputs, "x": replace(x, array=spoiled)})
        with np.errstate(all="ignore"):
            found = bench_of(context, sick, world).run(steps)
        others = [i for i in range(world.num_tokens) if not first <= i < first + count]
        context.equal(found[others], clean[others], f"{case.op} of sequences beside one that is not a number")

    return run


def _composite(case: Case) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world = case.world.fitted(context.spec)
        bench = bench_of(context, case, world)
        if case.op in inherited_ops(bench.ops):
            raise Inherited(f"{case.op} is core's composite of plain ops, which is what it is compared with")
        steps = getattr(world, case.schedules[-1])()
        own = bench.run(steps)
        assert case.composite is not None
        plain_case = replace(case, fn=case.composite)
        composite = bench_of(context, plain_case, world).run(steps)
        # Each may be off by the bound.
        context.within(own, composite, 2 * np.asarray(case.exact(context.precision).error), case.op)

    return run
