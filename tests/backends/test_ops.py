"""Every op of every backend, through its hooks: within rule A of the reference, which is within it of a
formula over whole sequences.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from conformance.tolerance import Precision, worst
from core.contract.ops import FUSED_OPS, OPS, inherited_ops
from core.contract.types import CacheLayerSpec
from tests.backends import cache_cases, fused_cases, plain_cases
from tests.backends.cases import Case
from tests.backends.harness import BACKENDS, REFERENCE, Bench, plugin, spec_of
from tests.backends.steps import World

CASES = [*plain_cases.cases(), *cache_cases.cases(), *fused_cases.cases()]

RUNS = [
    pytest.param(backend, case, schedule, id=f"{backend}-{case.name}-{schedule}")
    for backend in BACKENDS
    for case in CASES
    if case.supported(spec_of(backend))
    for schedule in case.schedules
]
REFERENCE_RUNS = [
    pytest.param(case, schedule, id=f"{case.name}-{schedule}")
    for case in CASES
    for schedule in case.schedules
]
COMPOSITES = [
    pytest.param(backend, case, id=f"{backend}-{case.name}")
    for backend in BACKENDS
    for case in CASES
    if case.composite is not None and case.supported(spec_of(backend))
]
DOUBLE = Precision(out="float64", accumulator="float64")


def single(backend: str) -> Precision:
    """What a backend promises in float32."""
    return Precision(out="float32", accumulator=spec_of(backend).accumulator)


def widened(world: World) -> World:
    """The same with caches in float64."""

    def layer(spec: CacheLayerSpec) -> CacheLayerSpec:
        state = tuple(replace(part, dtype="float64") for part in spec.state)
        return replace(spec, dtype="float64", state=state)

    return replace(world, layers=tuple(layer(spec) for spec in world.layers))


@cache
def reference(name: str, schedule: str) -> Any:
    """What the reference gives in float64 for a case."""
    case = next(case for case in CASES if case.name == name)
    world = widened(case.world)
    return Bench(REFERENCE, "float64", world, case.inputs, case.fn, exact=True).run(
        getattr(world, schedule)()
    )


@pytest.mark.parametrize(("case", "schedule"), REFERENCE_RUNS)
def test_the_reference_agrees_with_the_formula_over_whole_sequences(case: Case, schedule: str) -> None:
    wanted = case.exact(DOUBLE)
    # Both sides are computed in float64, so both may be off by the bound.
    ratio = worst(reference(case.name, schedule), wanted.value, 2 * np.asarray(wanted.error))
    assert ratio <= 1


@pytest.mark.parametrize(("backend", "case", "schedule"), RUNS)
def test_a_backend_is_within_rule_a_of_the_reference(backend: str, case: Case, schedule: str) -> None:
    bench = Bench(backend, "float32", case.world, case.inputs, case.fn)
    found = bench.run(getattr(case.world, schedule)())
    bound = case.exact(single(backend)).error
    ratio = worst(found, reference(case.name, schedule), bound)
    assert ratio <= 1


@pytest.mark.parametrize(("backend", "case"), COMPOSITES)
def test_a_fused_op_agrees_with_its_composite(backend: str, case: Case) -> None:
    assert case.composite is not None
    bench = Bench(backend, "float32", case.world, case.inputs, case.fn)
    if case.op in inherited_ops(bench.ops):
        return  # the op is the composite
    steps = getattr(case.world, case.schedules[-1])()
    own = bench.run(steps)
    composite = Bench(backend, "float32", case.world, case.inputs, case.composite).run(steps)
    bound = case.exact(single(backend)).error
    ratio = worst(own, composite, 2 * np.asarray(bound))  # each may be off by the bound
    assert ratio <= 1


def test_every_op_has_a_case_and_every_fused_op_a_composite() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert {case.op for case in CASES if case.composite is not None} == FUSED_OPS
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_reference_inherits_no_op() -> None:
    from core.contract.requests import OpsRequest

    table = plugin(REFERENCE).core_ops(OpsRequest(device=None, dtype="float64"))
    assert inherited_ops(table) == ()
