"""On the reference backend a row's bits depend on its own request alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.cpu_reference.arithmetic import product, rms_norm
from conformance.world import Row, World
from tests.backends.harness import REFERENCE, Bench
from tests.backends.test_ops import CASES, widened

# Not causal, or made to read the step's first row: here a row's result is not its own affair.
SHARED = ("take", "experts-moved", "attend-non-causal", "norm_rope_attend-non-causal")
INVARIANT = [case for case in CASES if not case.name.startswith(SHARED)]


def bench(case: Any, dtype: str, world: World | None = None) -> Bench:
    world = world or case.world
    return Bench(
        REFERENCE,
        dtype,
        widened(world) if dtype == "float64" else world,
        case.inputs,
        case.fn,
        exact=dtype == "float64",
    )


def bits(x: Any) -> Any:
    return np.ascontiguousarray(x).view(np.uint64 if x.dtype == np.float64 else np.uint32)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_bits_do_not_depend_on_chunks_or_on_other_rows(case: Any, dtype: str) -> None:
    world = case.world
    whole = bits(bench(case, dtype).run(world.whole()))
    assert np.array_equal(bits(bench(case, dtype).run(world.single())), whole)
    assert np.array_equal(bits(bench(case, dtype).run(world.mixed())), whole)
    alone = [[Row(s, 0, n)] for s, n in enumerate(world.lengths)]
    assert np.array_equal(bits(bench(case, dtype).run(alone)), whole)


@pytest.mark.parametrize("case", [c for c in INVARIANT if c.world.layers], ids=lambda case: case.name)
def test_bits_do_not_depend_on_where_blocks_lie_or_how_large_they_are(case: Any) -> None:
    whole = bits(bench(case, "float64").run(case.world.whole()))
    for block_size, seed in ((8, 6), (1, 7), (32, 8)):
        world = replace(case.world, block_size=block_size, seed=seed)
        assert np.array_equal(bits(bench(case, "float64", world).run(world.mixed())), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 65, 127, 255, 576, 1537])
@pytest.mark.parametrize("outputs", [1, 2, 5, 16, 63, 192, 1025])
def test_a_products_row_has_the_same_bits_alone_and_among_others(size: int, outputs: int) -> None:
    rng = np.random.default_rng(size)
    x, w = rng.normal(size=(9, size + 3)), rng.normal(size=(outputs, size))
    many = product(x[:, 1:-2], w)  # rows of a wider array, at any alignment
    for i in range(len(x)):
        alone = product(x[i : i + 1, 1:-2].copy(), w)
        assert np.array_equal(bits(many[i : i + 1]), bits(alone))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 65, 127, 129, 255, 576, 1537])
def test_a_norms_row_has_the_same_bits_alone_and_among_others(size: int) -> None:
    rng = np.random.default_rng(size)
    x, n = rng.normal(size=(9, size + 3)), rng.normal(size=size)
    many = rms_norm(x[:, 1:-2], n, 1e-5)
    for i in range(len(x)):
        assert np.array_equal(bits(many[i : i + 1]), bits(rms_norm(x[i : i + 1, 1:-2].copy(), n, 1e-5)))
