"""The reference's ops against formulas over whole sequences. Other backends are held to it by the suite."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from conformance.opcases import cached, fused, plain
from conformance.opcases.base import Case
from conformance.tolerance import Precision, worst
from conformance.world import World
from core.contract.ops import FUSED_OPS, OPS, inherited_ops
from core.contract.types import CacheLayerSpec
from tests.backends.harness import REFERENCE, Bench, plugin

CASES = [*plain.cases(), *cached.cases(), *fused.cases()]

REFERENCE_RUNS = [
    pytest.param(case, schedule, id=f"{case.name}-{schedule}")
    for case in CASES
    for schedule in case.schedules
]
DOUBLE = Precision(out="float64", accumulator="float64")


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


def test_every_op_has_a_case_and_every_fused_op_a_composite() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert {case.op for case in CASES if case.composite is not None} == FUSED_OPS
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_reference_inherits_no_op() -> None:
    from core.contract.requests import OpsRequest

    table = plugin(REFERENCE).core_ops(OpsRequest(device=None, dtype="float64"))
    assert inherited_ops(table) == ()
