"""L2: whole tensors of the main ops: no worse than an emulation in the same precision (rule B), and without
bias (rule C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conformance.bench import Array, Bench
from conformance.bias import allowance
from conformance.check import Check, Context
from conformance.emulation import EmulatedOps
from conformance.levels.kernels import in_dtype, oracle, profile_of, widened
from conformance.opcases import bulk
from conformance.opcases.bulk import Bulk
from conformance.tolerance import Precision
from conformance.world import World
from core.contract.spec import BackendSpec


class Exact:
    """What the oracle gives for a case in float64, [T, V]; computed once in a worker."""

    def __init__(self, case: Bulk) -> None:
        self._case = case
        self._known: dict[World, Array] = {}

    def __call__(self, world: World) -> Array:
        if world not in self._known:
            case = self._case
            bench = Bench(oracle(), "float64", widened(world), case.inputs, case.fn, exact=True)
            self._known[world] = bench.run(world.whole())
        return self._known[world]


def emulated(case: Bulk, world: World, precision: Precision) -> list[Array]:
    """What it gives in a backend's precision, in each form of the op that rounds elsewhere."""
    found = []
    for expand in (False, True) if case.op == "attend_latent" else (False,):

        def table(ops: object, expand: bool = expand) -> EmulatedOps:
            return EmulatedOps(ops, precision, expand=expand)  # type: ignore[arg-type]

        bench = Bench(oracle(), "float64", widened(world), case.inputs, case.fn, exact=True, table=table)
        found.append(bench.run(world.whole()))
    return found


def result(context: Context, case: Bulk, world: World) -> Array:
    """What the backend under test gives."""
    inside = in_dtype(world, context.dtype)
    bench = Bench(context.subject, context.dtype, inside, case.inputs, case.fn)
    return bench.run(getattr(world, case.schedule)())


def _rule_b(case: Bulk, exact: Exact) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world = case.world.fitted(context.spec)
        rivals = emulated(case, world, context.precision)
        found = result(context, case, world)
        context.as_good(found, exact(world), rivals, case.op, case.kappa, case.out)

    return run


def _rule_c(case: Bulk, exact: Exact) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        world = case.world.fitted(context.spec)
        allowed = allowance(context.precision, case.roundings, case.functions)
        context.unbiased(result(context, case, world), exact(world), allowed, case.op)

    return run


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for case in bulk.cases():
        exact = Exact(case)
        for rule, run, about in (
            ("rule-b", _rule_b(case, exact), "the tensor's errors are those of the same precision, emulated"),
            (
                "rule-c",
                _rule_c(case, exact),
                "errors have no trend and no mean, so no factor and no term is wrong",
            ),
        ):
            yield Check(
                id=f"L2/{case.op}/bulk-{case.name}-{rule}",
                run=run,
                about=f"{case.op}, {case.name}, 100,000 results: {about}",
                supported=case.supported,
                profile=profile_of(case.op),
            )
