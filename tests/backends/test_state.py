"""Caches, state slots and `last`: what a backend's memory promises, whatever its layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conformance.tolerance import worst
from core.contract.errors import DeviceError, OutOfMemoryError, UnsupportedError
from core.contract.requests import AllocatorRequest
from core.contract.types import CacheLayerSpec, Outputs, PackRequest, SamplingBatch, StatePart
from tests.backends.cache_cases import attention_spec, latent_layer, layer_of
from tests.backends.cases import Case, Draw, table
from tests.backends.harness import BACKENDS, REFERENCE, Bench, device_of, plugin, spec_of
from tests.backends.steps import Row, World
from tests.backends.test_ops import CASES, reference, single

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


def held(backend: str, kind: str) -> bool:
    spec = spec_of(backend)
    return {
        "paged": True,
        "window": spec.attention.window,
        "latent": spec.attention.latent,
        "state": bool(spec.state_kinds),
    }[kind]


MEMORY = [
    pytest.param(backend, kind, id=f"{backend}-{kind}")
    for backend in BACKENDS
    for kind in LAYERS
    if held(backend, kind)
]
ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
IN_MEMORY = pytest.mark.parametrize(("backend", "kind"), MEMORY)


def nothing(ops: Any, w: Any, caches: Any, step: Any) -> Any:
    raise AssertionError("this test runs no step")


def empty_bench(backend: str, kind: str) -> Bench:
    """Two layers of a kind, each a group of its own."""
    return Bench(backend, "float32", World((29, 3), (LAYERS[kind],) * 2), {}, nothing)


def fill(bench: Bench, layer: int, blocks: list[int]) -> tuple[Any, ...]:
    """Import random blocks; what was imported."""
    parts = bench.allocator.export_blocks(bench.state, layer, blocks).get()
    rng = np.random.default_rng(layer)
    data = tuple(rng.normal(size=part.shape).astype(part.dtype) for part in parts)
    bench.state = bench.allocator.import_blocks(bench.state, layer, blocks, data)
    return data


def read(bench: Bench, layer: int, blocks: list[int]) -> tuple[Any, ...]:
    found: tuple[Any, ...] = bench.allocator.export_blocks(bench.state, layer, blocks).get()
    return found


def same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True)
    )


def shapes(bench: Bench, kind: str, n: int) -> list[tuple[int, ...]]:
    """Of the canonical form of n blocks."""
    layer, Z = LAYERS[kind], bench.world.block_size
    if kind == "state":
        return [(n, *part.shape) for part in layer.state]
    if kind == "latent":
        return [(n, Z, layer.latent_size + layer.rope_size)]
    K = layer.num_kv_heads
    return [(n, Z, K, layer.head_size), (n, Z, K, layer.v_head_size)]


@IN_MEMORY
def test_blocks_that_were_imported_are_exported_bit_for_bit(backend: str, kind: str) -> None:
    bench = empty_bench(backend, kind)
    data = fill(bench, 1, [3, 1, 4])
    assert [x.shape for x in data] == shapes(bench, kind, 3)
    assert same(read(bench, 1, [3, 1, 4]), data)
    assert same(read(bench, 1, [4, 3]), tuple(x[[2, 0]] for x in data))


@IN_MEMORY
def test_an_export_keeps_its_values_when_the_blocks_change(backend: str, kind: str) -> None:
    bench = empty_bench(backend, kind)
    data = fill(bench, 0, [2])
    pending = bench.allocator.export_blocks(bench.state, 0, [2])
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [2])
    assert same(pending.get(), data)
    assert same(pending.get(), data)


@IN_MEMORY
def test_copies_read_before_they_write_and_stay_in_their_group(backend: str, kind: str) -> None:
    bench = empty_bench(backend, kind)
    first, second = fill(bench, 0, [1, 2, 3]), fill(bench, 1, [1, 2, 3])
    bench.state = bench.allocator.copy_blocks(bench.state, 0, [1, 2, 3], [2, 3, 1])
    assert same(read(bench, 0, [2, 3, 1]), first)
    assert same(read(bench, 1, [1, 2, 3]), second)


@IN_MEMORY
def test_zeroed_blocks_hold_zeros_and_the_others_what_they_held(backend: str, kind: str) -> None:
    bench = empty_bench(backend, kind)
    data = fill(bench, 0, [1, 2, 3])
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [2])
    assert same(read(bench, 0, [2]), tuple(np.zeros_like(x[:1]) for x in data))
    assert same(read(bench, 0, [1, 3]), tuple(x[[0, 2]] for x in data))


@IN_MEMORY
def test_memory_in_use_is_counted_and_given_back(backend: str, kind: str) -> None:
    allocator = plugin(backend).core_memory_allocator(AllocatorRequest(device=device_of(backend)))
    world = World((29, 3), (LAYERS[kind],) * 2)
    least = sum(
        allocator.block_bytes(LAYERS[kind], group.block_size) * group.num_blocks
        for group in world.plan.groups
    )
    assert allocator.used_bytes() == 0
    state = allocator.allocate_state(world.plan)
    assert least <= allocator.used_bytes() <= least + 4096
    allocator.free_state(state)
    assert allocator.used_bytes() == 0


@ON_EVERY_BACKEND
def test_what_does_not_fit_the_budget_is_refused_and_takes_nothing(backend: str) -> None:
    device = device_of(backend)
    allocator = plugin(backend).core_memory_allocator(AllocatorRequest(device=device, budget_bytes=10_000))
    plan = World((29, 3), (LAYERS["paged"],)).plan
    with pytest.raises(OutOfMemoryError) as raised:
        allocator.allocate_state(plan)
    assert raised.value.wanted_bytes > 10_000
    with pytest.raises(OutOfMemoryError, match="a large weight"):
        allocator.pack(
            PackRequest(array=np.zeros((100, 100)), uses=("linear",), dtype="float32", name="a large weight")
        )
    assert allocator.used_bytes() == 0
    fits = allocator.pack(
        PackRequest(array=np.ones((20, 10)), uses=("linear",), dtype="float32", name="small")
    )
    assert np.array_equal(allocator.unpack(fits), np.ones((20, 10)))


@ON_EVERY_BACKEND
@pytest.mark.parametrize("uses", [("linear",), ("embed", "linear"), ("norm",), ("bias",), ("experts",)])
def test_a_packed_parameter_unpacks_to_its_canonical_array(backend: str, uses: tuple[str, ...]) -> None:
    allocator = plugin(backend).core_memory_allocator(AllocatorRequest(device=device_of(backend)))
    shape = {"experts": (3, 10, 6), "norm": (7,), "bias": (7,)}.get(uses[0], (9, 5))
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    packed = allocator.pack(PackRequest(array=array, uses=uses, dtype="float32", name="w"))
    assert np.array_equal(allocator.unpack(packed), array)


@ON_EVERY_BACKEND
def test_an_undeclared_scheme_or_dtype_is_refused(backend: str) -> None:
    allocator = plugin(backend).core_memory_allocator(AllocatorRequest(device=device_of(backend)))
    request = PackRequest(array=np.zeros((4, 4)), uses=("linear",), dtype="float32", name="w")
    with pytest.raises(UnsupportedError, match="no-such-scheme"):
        allocator.pack(replace(request, scheme="no-such-scheme"))
    with pytest.raises(UnsupportedError, match="int3"):
        allocator.pack(replace(request, dtype="int3"))
    layer = replace(LAYERS["paged"], dtype="int3")
    with pytest.raises(UnsupportedError, match="int3"):
        allocator.allocate_state(World((3,), (layer,)).plan)
    assert allocator.used_bytes() == 0


CACHED = [
    pytest.param(backend, case, id=f"{backend}-{case.name}")
    for backend in BACKENDS
    for case in CASES
    if case.world.layers and case.supported(spec_of(backend))
]


@pytest.mark.parametrize(("backend", "case"), CACHED)
def test_no_result_depends_on_an_entry_that_is_not_the_rows_own(backend: str, case: Case) -> None:
    bench = Bench(backend, "float32", case.world, case.inputs, case.fn)
    every = list(range(case.world.plan.groups[0].num_blocks))
    parts = bench.allocator.export_blocks(bench.state, 0, every).get()
    poison = tuple(np.full_like(part, np.nan) for part in parts)
    bench.state = bench.allocator.import_blocks(bench.state, 0, every, poison)
    schedule = case.schedules[-1]
    found = bench.run(getattr(case.world, schedule)())
    ratio = worst(found, reference(case.name, schedule), case.exact(single(backend)).error)
    assert ratio <= 1


RECURRENT = [
    pytest.param(backend, case, id=f"{backend}-{case.name}")
    for backend in BACKENDS
    for case in CASES
    if case.op in ("short_conv", "state_scan") and case.supported(spec_of(backend))
]


@pytest.mark.parametrize(("backend", "case"), RECURRENT)
@pytest.mark.parametrize("offset", [1, 7, 12])
def test_a_row_continues_from_a_checkpoint_as_if_it_had_never_stopped(
    backend: str, case: Case, offset: int
) -> None:
    bench = Bench(backend, "float32", case.world, case.inputs, case.fn)
    slot = case.world.checkpoint_slot(0)
    found = bench.step([Row(0, 0, 12, checkpoint_offset=offset, checkpoint=slot), Row(1, 0, 3)])
    on = bench.step([Row(0, 12, 6), Row(1, 3, 2)])  # the row's own slot went on to the end
    again = bench.step([Row(0, offset, 11)], read=slot)
    wanted = reference(case.name, "whole")
    error = np.asarray(case.exact(single(backend)).error)
    for (sequence, position), row in [*found.items(), *on.items(), *again.items()]:
        t = case.world.first_id(sequence) + position
        ratio = worst(row, wanted[t], error[t])
        assert ratio <= 1


WORDS = World((4, 2, 3), outputs=Outputs())


def greedy(n: int) -> SamplingBatch:
    zeros = np.zeros(n, np.int32)
    return SamplingBatch(
        temperature=np.zeros(n, np.float32),
        top_k=zeros,
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        seed=np.zeros(n, np.uint64),
        position=zeros,
        choice=zeros,
    )


def words_bench(backend: str) -> Bench:
    """Logits of the sampled rows are their tokens' rows of a random square table."""
    x = Draw(3)(WORDS.num_tokens, WORDS.num_tokens)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return ops.take(ops.embed_step(w["x"], step), step.sample_rows), caches

    return Bench(backend, "float32", WORDS, {"x": table(x)[0]}, fn)


@ON_EVERY_BACKEND
def test_a_token_source_takes_the_place_of_the_id(backend: str) -> None:
    bench = words_bench(backend)
    rows = bench.step([Row(0, 1, 1), Row(1, 1, 1), Row(2, 1, 1)])
    bench.state = bench.allocator.set_last(bench.state, [2, 0], [5, 7])
    fed = bench.step([Row(0, 1, 1, source=0), Row(1, 1, 1), Row(2, 1, 1, source=2)])
    assert np.array_equal(fed[0, 1], rows[2, 1])  # 7 is the second token of sequence 2
    assert np.array_equal(fed[1, 1], rows[1, 1])
    assert np.array_equal(fed[2, 1], rows[1, 1])  # and 5 that of sequence 1


@ON_EVERY_BACKEND
def test_sampling_writes_last_of_the_sampled_slots_and_of_no_other(backend: str) -> None:
    bench = words_bench(backend)
    bench.state = bench.allocator.set_last(bench.state, range(6), [8] * 6)
    rows = [Row(0, 0, 3), Row(1, 0, 2, sampled=False), Row(2, 0, 2)]
    batch = bench.world.batch(rows, bench.rules)
    program = bench.program(batch.layout)
    output, bench.state = program.run(batch, bench.state)
    logits = output.get()
    tokens, bench.state = program.sample(output, batch, greedy(2), bench.state)
    drawn = tokens.get().tokens
    assert drawn.tolist() == logits.argmax(-1).tolist()
    fed = bench.step([Row(s, 3, 1, source=s) for s in (0, 1, 2)])
    by_id = {}
    for token in {*drawn.tolist(), 8}:
        bench.state = bench.allocator.set_last(bench.state, [4], [token])
        by_id[token] = bench.step([Row(0, 3, 1, source=4)])[0, 3]
    assert np.array_equal(fed[0, 3], by_id[int(drawn[0])])
    assert np.array_equal(fed[1, 3], by_id[8])
    assert np.array_equal(fed[2, 3], by_id[int(drawn[1])])


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
