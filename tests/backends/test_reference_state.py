"""The reference refuses what others may leave undefined: states that were used, entries never written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conformance.opcases.base import Draw, table
from conformance.opcases.cached import attention_spec, latent_layer, layer_of
from conformance.world import Row, World
from core.contract.errors import DeviceError
from core.contract.types import CacheLayerSpec, Outputs, StatePart
from tests.backends.harness import REFERENCE, Bench
from tests.backends.test_ops import CASES

LAYERS = {
    "paged": layer_of(attention_spec()),
    "window": layer_of(attention_spec(), window=9),
    "latent": latent_layer(),
    "state": CacheLayerSpec(
        kind="state",
        dtype="float32",
        state=(
            StatePart(name="conv", shape=(5, 3), dtype="float32"),
            StatePart(name="scan", shape=(2, 4, 6), dtype="float32"),
        ),
    ),
}


def nothing(ops: Any, w: Any, caches: Any, step: Any) -> Any:
    raise AssertionError("this test runs no step")


def empty_bench(backend: str, kind: str) -> Bench:
    """Two layers of a kind, each a group of its own."""
    return Bench(backend, "float32", World((29, 3), (LAYERS[kind],) * 2), {}, nothing)


def read(bench: Bench, layer: int, blocks: list[int]) -> tuple[Any, ...]:
    found: tuple[Any, ...] = bench.allocator.export_blocks(bench.state, layer, blocks).get()
    return found


WORDS = World((4, 2, 3), outputs=Outputs())


def words_bench(backend: str) -> Bench:
    """Logits of the sampled rows are their tokens' rows of a random square table."""
    x = Draw(3)(WORDS.num_tokens, WORDS.num_tokens)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return ops.take(ops.embed_step(w["x"], step), step.sample_rows), caches

    return Bench(backend, "float32", WORDS, {"x": table(x)[0]}, fn)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_reference_refuses_a_state_that_was_used(kind: str) -> None:
    bench = empty_bench(REFERENCE, kind)
    old = bench.state
    bench.state = bench.allocator.zero_blocks(old, 0, [1])
    for use in (
        lambda: bench.allocator.export_blocks(old, 0, [1]),
        lambda: bench.allocator.zero_blocks(old, 0, [1]),
        lambda: bench.allocator.set_last(old, [0], [1]),
        lambda: bench.allocator.free_state(old),
    ):
        with pytest.raises(DeviceError, match="used before"):
            use()
    bench.allocator.free_state(bench.state)
    with pytest.raises(DeviceError, match="used before"):
        bench.allocator.export_blocks(bench.state, 0, [1])


@pytest.mark.parametrize("name", ["attend-grouped-out", "attend_latent-out", "short_conv-4", "state_scan"])
def test_the_reference_refuses_a_state_or_a_handle_that_a_step_took(name: str) -> None:
    case = next(case for case in CASES if case.name == name)

    def forgets(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        case.fn(ops, w, caches, step)
        return case.fn(ops, w, caches, step)  # the op returned another handle

    bench = Bench(REFERENCE, "float32", case.world, case.inputs, case.fn)
    old = bench.state
    bench.step([Row(0, 0, 2)])
    batch = case.world.batch([Row(0, 2, 1)], bench.rules)
    with pytest.raises(DeviceError, match="used before"):
        bench.program(batch.layout).run(batch, old)
    with pytest.raises(DeviceError, match="used before"):
        Bench(REFERENCE, "float32", case.world, case.inputs, forgets).step([Row(0, 0, 2)])


def test_the_reference_refuses_a_used_state_that_has_no_caches() -> None:
    bench = words_bench(REFERENCE)
    old = bench.state
    bench.step([Row(0, 0, 2)])
    batch = WORDS.batch([Row(0, 2, 1)], bench.rules)
    with pytest.raises(DeviceError, match="used before"):
        bench.program(batch.layout).run(batch, old)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_was_never_written_reads_as_nan_on_the_reference(kind: str) -> None:
    bench = empty_bench(REFERENCE, kind)
    assert all(np.isnan(part).all() for part in read(bench, 0, [1, 4]))
    with pytest.raises(DeviceError, match="blocks \\[-1\\] of cache group 0"):
        read(bench, 0, [-1])
