"""L1: blocks and state slots hold what was written to them, and memory is counted and given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conformance.bench import Bench
from conformance.check import Check, Context, Missing
from conformance.opcases.base import Draw, table
from conformance.opcases.cached import attention_spec, latent_layer, layer_of
from conformance.world import Row, World
from core.contract.errors import DeviceError, OutOfMemoryError
from core.contract.requests import AllocatorRequest
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec, Outputs, PackRequest, SamplingBatch, State, StatePart

LENGTHS = (29, 3)
POOL = 80
"""Sequences of one block each, for which a pool has 161."""
ROOM = 8 << 20
"""By how much a process may grow in a hundred cycles, in bytes: a heap keeps some of what was freed."""
NEEDS = {"window": ("attention.window",), "latent": ("attention.latent",), "state": ("state_kinds",)}
Parts = tuple[Any, ...]


def head_size(spec: BackendSpec) -> int:
    """A head size that the backend takes; small where any is."""
    return min(spec.attention.head_sizes, default=8)


def layers(spec: BackendSpec, dtype: str) -> dict[str, CacheLayerSpec]:
    """A layer of each kind."""
    attention = attention_spec(H=head_size(spec))
    found = {
        "paged": layer_of(attention),
        "window": layer_of(attention, window=9),
        "latent": latent_layer(),
        "state": CacheLayerSpec(
            kind="state",
            dtype=dtype,
            state=(
                StatePart(name="conv", shape=(5, 3), dtype=dtype),
                StatePart(name="scan", shape=(2, 4, 6), dtype="float32"),
            ),
        ),
    }
    return {kind: replace(layer, dtype=dtype) for kind, layer in found.items()}


def world_of(context: Context, kind: str) -> World:
    """Two layers of a kind, each a group of its own."""
    layer = layers(context.spec, context.dtype)[kind]
    return World(LENGTHS, (layer,) * 2).fitted(context.spec)


def nothing(ops: Any, w: Any, caches: Any, step: Any) -> Any:
    """A step function for checks that run no step."""
    raise AssertionError("this check runs no step")


def empty(context: Context, kind: str) -> Bench:
    """Caches of a kind."""
    return Bench(context.subject, context.dtype, world_of(context, kind), {}, nothing)


def fill(context: Context, bench: Bench, layer: int, blocks: list[int]) -> Parts:
    """Import random blocks; what was imported."""
    parts = bench.allocator.export_blocks(bench.state, layer, blocks).get()
    rng = context.rng()
    data = tuple((rng.normal(size=part.shape) + layer).astype(part.dtype) for part in parts)
    bench.state = bench.allocator.import_blocks(bench.state, layer, blocks, data)
    return data


def read(bench: Bench, layer: int, blocks: list[int]) -> Parts:
    """Export blocks and wait."""
    found: Parts = bench.allocator.export_blocks(bench.state, layer, blocks).get()
    return found


def same(context: Context, found: Parts, wanted: Parts, what: str) -> None:
    """Hold parts to be equal, bit for bit."""
    context.require(len(found) == len(wanted), f"{what} has {len(found)} parts, {len(wanted)} are wanted")
    for a, b in zip(found, wanted, strict=True):
        context.require(a.dtype == b.dtype, f"{what} is {a.dtype}, but {b.dtype} is wanted")
        one, other = (np.ascontiguousarray(x).view(np.uint8) for x in (a, b))
        context.equal(one, other, what)


def round_trip(context: Context, kind: str) -> None:
    bench = empty(context, kind)
    data = fill(context, bench, 1, [3, 1, 4])
    layer, Z = bench.world.layers[1], bench.world.block_size
    K = layer.num_kv_heads
    wanted = {
        "latent": [(3, Z, layer.latent_size + layer.rope_size)],
        "state": [(3, *part.shape) for part in layer.state],
    }.get(kind, [(3, Z, K, layer.head_size), (3, Z, K, layer.v_head_size)])
    shapes = [x.shape for x in data]
    context.require(shapes == wanted, f"exported parts have shapes {shapes}, but {wanted} are wanted")
    same(context, read(bench, 1, [3, 1, 4]), data, "what was imported")
    same(context, read(bench, 1, [4, 3]), tuple(x[[2, 0]] for x in data), "blocks in another order")


def every_block(context: Context, kind: str) -> None:
    """All blocks of all layers at once hold different values, so that none lies in another's place."""
    bench = empty(context, kind)
    held = {}
    for layer in range(2):
        blocks = list(range(bench.world.plan.groups[layer].num_blocks))
        order = context.rng().permutation(blocks).tolist()
        held[layer] = order, fill(context, bench, layer, order)
    for layer, (order, data) in held.items():
        same(context, read(bench, layer, order), data, f"all blocks of layer {layer}")


def export_is_a_copy(context: Context, kind: str) -> None:
    bench = empty(context, kind)
    data = fill(context, bench, 0, [2])
    pending = bench.allocator.export_blocks(bench.state, 0, [2])
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [2])
    same(context, pending.get(), data, "an export after its block was zeroed")
    same(context, pending.get(), data, "the same export, read again")


def copies(context: Context, kind: str) -> None:
    bench = empty(context, kind)
    first, second = fill(context, bench, 0, [1, 2, 3]), fill(context, bench, 1, [1, 2, 3])
    bench.state = bench.allocator.copy_blocks(bench.state, 0, [1, 2, 3], [2, 3, 1])
    same(context, read(bench, 0, [2, 3, 1]), first, "blocks copied in a circle")
    same(context, read(bench, 1, [1, 2, 3]), second, "blocks of the other group")
    bench.state = bench.allocator.copy_blocks(bench.state, 0, [2, 2], [4, 1])
    same(context, read(bench, 0, [4]), tuple(x[:1] for x in first), "one block copied twice")


def zeros(context: Context, kind: str) -> None:
    bench = empty(context, kind)
    data = fill(context, bench, 0, [1, 2, 3])
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [2])
    same(context, read(bench, 0, [2]), tuple(np.zeros_like(x[:1]) for x in data), "a zeroed block")
    same(context, read(bench, 0, [1, 3]), tuple(x[[0, 2]] for x in data), "its neighbours")


def whole_pool(context: Context, kind: str) -> None:
    """One call takes all blocks, or nearly all, in any order: none is left out of many."""
    layer = layers(context.spec, context.dtype)[kind]
    world = World((1,) * POOL, (layer,) * 2).fitted(context.spec)
    bench = Bench(context.subject, context.dtype, world, {}, nothing)
    rng, every = context.rng(), np.arange(world.plan.groups[0].num_blocks)
    data = fill(context, bench, 0, every.tolist())
    beside = fill(context, bench, 1, every.tolist())
    order, sources = rng.permutation(every), rng.permutation(every)
    same(context, read(bench, 0, order.tolist()), tuple(x[order] for x in data), "all blocks at once")
    bench.state = bench.allocator.copy_blocks(bench.state, 0, sources.tolist(), order.tolist())
    # Block order[i] holds now what sources[i] held.
    moved = tuple(x[sources[np.argsort(order)]] for x in data)
    same(context, read(bench, 0, every.tolist()), moved, "all blocks, each copied into another's place")
    zeroed = order[:-3]
    bench.state = bench.allocator.zero_blocks(bench.state, 0, zeroed.tolist())
    for part in moved:
        part[zeroed] = 0
    same(context, read(bench, 0, every.tolist()), moved, "the pool when all but three blocks were zeroed")
    same(context, read(bench, 1, every.tolist()), beside, "blocks of the other group")


def far(context: Context) -> None:
    """Blocks on both sides of where an index of 32 bits turns negative, and the first ones."""
    layer = layers(context.spec, context.dtype)["paged"]
    world, mark = beyond(context, World((20, 3), (layer,)).fitted(context.spec))
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    state = allocator.allocate_state(world.plan)
    last = world.plan.groups[0].num_blocks - 1
    blocks = [1, 2, 3, mark - 1, mark, mark + 1, last]
    rng = context.rng()
    shapes = [part.shape[1:] for part in allocator.export_blocks(state, 0, [1]).get()]
    held = tuple(
        rng.normal(size=(len(blocks), *shape)).astype(np.dtype(world.layers[0].dtype)) for shape in shapes
    )

    def pick(*at: int) -> Parts:
        return tuple(x[list(at)] for x in held)

    state = allocator.import_blocks(state, 0, blocks, held)
    same(context, allocator.export_blocks(state, 0, blocks).get(), held, f"blocks about block {mark}")
    state = allocator.copy_blocks(state, 0, [mark + 1, 1], [2, last])
    same(
        context,
        allocator.export_blocks(state, 0, [2, last]).get(),
        pick(5, 0),
        "blocks copied across the mark",
    )
    state = allocator.zero_blocks(state, 0, [mark])
    found = allocator.export_blocks(state, 0, [mark - 1, mark, mark + 1]).get()
    wanted = tuple(np.stack([x[0], np.zeros_like(x[1]), x[2]]) for x in pick(3, 4, 5))
    same(context, found, wanted, "a zeroed block and its neighbours")
    allocator.free_state(state)


def beyond(context: Context, world: World) -> tuple[World, int]:
    """The world with its blocks about the end of the first 2**31 elements of a part of its one layer, and the
    block in which that lies.

    Raises:
        Missing: the device has not the memory.
    """
    layer = world.layers[0]
    mark = 2**31 // (world.block_size * layer.num_kv_heads * layer.head_size)
    world = replace(world, first_block=mark - 2)
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    wanted = allocator.block_bytes(layer, world.block_size) * world.plan.groups[0].num_blocks
    free = context.subject.device.memory().free_bytes
    if wanted > 0.9 * free:
        raise Missing(f"a cache of more than 2**31 elements has {wanted} bytes; the device has {free} free")
    return world, mark


def nothing_to_move(context: Context, kind: str) -> None:
    bench = empty(context, kind)
    data = fill(context, bench, 0, [1])
    bench.state = bench.allocator.copy_blocks(bench.state, 0, [], [])
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [])
    found = read(bench, 0, [])
    context.require(all(x.shape[0] == 0 for x in found), "no blocks exported give arrays that are not empty")
    bench.state = bench.allocator.import_blocks(bench.state, 0, [], found)
    same(context, read(bench, 0, [1]), data, "a block after empty operations")


def counted(context: Context, kind: str) -> None:
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    world = world_of(context, kind)
    least = sum(
        allocator.block_bytes(world.layers[layer], group.block_size) * group.num_blocks
        for group in world.plan.groups
        for layer in group.layers
    )
    context.require(allocator.used_bytes() == 0, "a new allocator says that it holds memory")
    state = allocator.allocate_state(world.plan)
    used = allocator.used_bytes()
    context.record("used_bytes", used)
    context.require(
        least <= used <= least + 4096,
        f"{used} bytes are used for blocks of {least} (block_bytes x num_blocks); 4096 more may be",
    )
    allocator.free_state(state)
    context.require(allocator.used_bytes() == 0, f"{allocator.used_bytes()} bytes are used after free_state")


def cycles(context: Context, kind: str) -> None:
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    plan = world_of(context, kind).plan
    for i in range(200):
        allocator.free_state(allocator.allocate_state(plan))
        if i == 99:
            before = resident_bytes()
    context.require(allocator.used_bytes() == 0, "memory is held after 200 cycles of allocate and free")
    if before is not None and (after := resident_bytes()) is not None:
        context.record("grown_bytes", after - before)
        context.require(
            after - before <= ROOM,
            f"the process holds {after - before} bytes more after 100 further cycles of allocate and free; "
            f"{ROOM} more may be",
        )


def resident_bytes() -> int | None:
    """Memory that this process holds, in bytes; None where the system does not tell."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def budget(context: Context) -> None:
    device = context.subject.device
    request = AllocatorRequest(device=device, budget_bytes=10_000)
    allocator = context.subject.handle.memory_allocator(request)
    layer = replace(layers(context.spec, context.dtype)["paged"])
    plan = World((900, 900), (layer,)).fitted(context.spec).plan
    try:
        allocator.allocate_state(plan)
    except OutOfMemoryError as error:
        context.require(
            error.wanted_bytes > 10_000, f"the error says that {error.wanted_bytes} bytes were wanted"
        )
    else:
        context.require(False, "caches larger than the budget are allocated; OutOfMemoryError is wanted")
    large = PackRequest(
        array=np.zeros((100, 100)), uses=("linear",), dtype=context.dtype, name="a large weight"
    )
    message = context.refused(
        lambda: allocator.pack(large), "a weight larger than the budget", OutOfMemoryError
    )
    context.require("a large weight" in message, f"the error does not name the weight: {message}")
    context.require(allocator.used_bytes() == 0, "what was refused holds memory")
    small = replace(large, array=np.ones((20, 10)), name="small")
    context.equal(
        allocator.unpack(allocator.pack(small)), np.ones((20, 10)), "a weight packed after a refusal"
    )


def pack_round_trip(context: Context, uses: tuple[str, ...]) -> None:
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    shape = {"experts": (3, 10, 6), "norm": (7,), "bias": (7,)}.get(uses[0], (9, 5))
    # Small integers are the same in every dtype.
    array = context.rng().integers(-8, 8, shape).astype(np.float64)
    packed = allocator.pack(PackRequest(array=array, uses=uses, dtype=context.dtype, name="w"))
    context.equal(
        np.asarray(allocator.unpack(packed), np.float64), array, f"a parameter for {', '.join(uses)}"
    )


WORDS = World((4, 2, 3), outputs=Outputs())


def words(context: Context, layers: tuple[CacheLayerSpec, ...] = ()) -> Bench:
    """Logits of the sampled rows are their tokens' rows of a random square table."""
    x = Draw(3)(WORDS.num_tokens, WORDS.num_tokens)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return ops.take(ops.embed_step(w["x"], step), step.sample_rows), caches

    world = replace(WORDS, layers=layers).fitted(context.spec)
    return Bench(context.subject, context.dtype, world, {"x": table(x)[0]}, fn)


def greedy(n: int) -> SamplingBatch:
    """n rows at temperature 0."""
    zero = np.zeros(n, np.int32)
    one = np.ones(n, np.float32)
    return SamplingBatch(
        temperature=0 * one,
        top_k=zero,
        top_p=one,
        min_p=0 * one,
        seed=zero.astype(np.uint64),
        position=zero,
        choice=zero,
    )


def token_source(context: Context) -> None:
    bench = words(context)
    rows = bench.step([Row(0, 1, 1), Row(1, 1, 1), Row(2, 1, 1)])
    bench.state = bench.allocator.set_last(bench.state, [2, 0], [5, 7])
    fed = bench.step([Row(0, 1, 1, source=0), Row(1, 1, 1), Row(2, 1, 1, source=2)])
    # 7 is the second token of sequence 2, and 5 that of sequence 1.
    for sequence, other in ((0, 2), (1, 1), (2, 1)):
        context.equal(fed[sequence, 1], rows[other, 1], f"sequence {sequence}, fed from `last`")


def sampled_slots(context: Context) -> None:
    bench = words(context)
    bench.state = bench.allocator.set_last(bench.state, list(range(6)), [8] * 6)
    rows = [Row(0, 0, 3), Row(1, 0, 2, sampled=False), Row(2, 0, 2)]
    drawn: dict[int, int] = {}
    for step in bench.world.legal([rows], bench.rules):
        batch = bench.world.batch(step, bench.rules)
        program = bench.program(batch.layout)
        output, bench.state = program.run(batch, bench.state)
        logits = output.get()
        tokens, bench.state = program.sample(output, batch, greedy(batch.num_samples), bench.state)
        found = tokens.get().tokens
        context.equal(found, logits.argmax(-1), "greedy tokens")
        drawn |= dict(zip(batch.sample_slots[: batch.num_samples].tolist(), found.tolist(), strict=True))
    fed = {s: bench.step([Row(s, 3, 1, source=s)])[s, 3] for s in (0, 1, 2)}
    by_id = {}
    for token in {*drawn.values(), 8}:
        bench.state = bench.allocator.set_last(bench.state, [4], [token])
        by_id[token] = bench.step([Row(0, 3, 1, source=4)])[0, 3]
    for slot in (0, 1, 2):
        context.equal(fed[slot], by_id[drawn.get(slot, 8)], f"`last` of slot {slot} after sampling")


def warmed(context: Context) -> None:
    """A program made ready leaves what it is given as it was: blocks, and the ids that slots drew last."""
    bench = words(context, (layers(context.spec, context.dtype)["paged"],))
    data = fill(context, bench, 0, [1, 2])
    bench.state = bench.allocator.set_last(bench.state, [2], [5])
    fed = bench.world.batch([Row(2, 1, 1, source=2)], bench.rules)
    state = bench.program(fed.layout).warm(bench.state)
    context.require(
        isinstance(state, State),
        f"warm gives a {type(state).__name__}, but the State to go on with is wanted",
    )
    bench.state = state
    same(context, read(bench, 0, [1, 2]), data, "blocks after a program was made ready")
    found = bench.step([Row(2, 1, 1, source=2)])[2, 1]
    context.equal(found, bench.step([Row(1, 1, 1)])[1, 1], "a row fed from `last` after that")


def padding_writes_nothing(context: Context) -> None:
    """A step smaller than its bucket leaves every live block as it was."""
    spec = attention_spec(H=head_size(context.spec))
    layer = replace(layer_of(spec), dtype=context.dtype)
    world = World((5, 5, 5), (layer,)).fitted(context.spec)
    n, N, K, H = world.num_tokens, spec.num_heads, spec.num_kv_heads, spec.head_size
    draw = Draw(8)
    source, slices = table(draw(n, N, H), draw(n, K, H), draw(n, K, H))

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        x = ops.embed(w["x"], ops.select_tokens(step))
        q, k, v = (x[:, s] for s in slices)
        k, v = k.reshape(-1, K, H), v.reshape(-1, K, H)
        out, _, cache = ops.attend(q.reshape(-1, N, H), k, v, caches[0], step, spec, None, False)
        return out.reshape(-1, N * H), (cache,)

    bench = Bench(context.subject, context.dtype, world, {"x": source}, fn)
    every = list(range(1, world.plan.groups[0].num_blocks))
    own = set(world.blocks[0][0].tolist())
    before = fill(context, bench, 0, every)
    for row in (Row(0, 0, 3), Row(0, 3, 1), Row(0, 4, 1)):
        bench.step([row])
    after = read(bench, 0, every)
    kept = [i for i, block in enumerate(every) if block not in own]
    same(
        context, tuple(x[kept] for x in after), tuple(x[kept] for x in before), "blocks of nobody in the step"
    )


def closed_device(context: Context) -> None:
    device = context.subject.open()
    device.close()
    device.close()
    context.refused(device.synchronize, "a call on a closed device", DeviceError)


KINDS = {
    round_trip: "blocks come back as they were imported, bit for bit, in canonical form",
    every_block: "no block lies in another's place",
    export_is_a_copy: "an export keeps its values when the blocks change afterwards",
    copies: "copies read before they write, and stay in their group",
    zeros: "zeroed blocks hold zeros, and others what they held",
    whole_pool: "all blocks are exported, imported, copied and zeroed in one call, in any order",
    nothing_to_move: "operations on no blocks change nothing",
    counted: "block_bytes tells what is used, and free_state gives it back",
    cycles: "no memory is lost over many cycles",
}
OTHERS = {
    budget: "what does not fit is refused with the typed error and holds nothing",
    token_source: "a token's id may come from `last`",
    sampled_slots: "sampling writes `last` of the sampled slots and of no other",
    warmed: "a program made ready before its first step changes nothing that is alive",
    padding_writes_nothing: "padding writes to no live block",
    closed_device: "a closed device refuses work, and may be closed again",
}
NEVER_WAIVED = (
    every_block,
    export_is_a_copy,
    copies,
    zeros,
    whole_pool,
    sampled_slots,
    padding_writes_nothing,
)
"""Where these fail, a request reads or writes what is another's."""
USES = (("linear",), ("embed", "linear"), ("norm",), ("bias",), ("experts",))


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for run, about in KINDS.items():
        for kind in ("paged", "window", "latent", "state"):
            profile = kind if kind in ("latent", "state") else "dense"
            yield Check(
                f"L1/blocks/{_name(run)}-{kind}",
                partial(run, kind=kind),
                f"{kind} caches: {about}",
                NEEDS.get(kind, ()),
                profile=profile,
                is_waivable=run not in NEVER_WAIVED,
            )
    about = "blocks past 2**31 elements are themselves"
    yield Check("L1/blocks/far", far, about, timeout_s=300.0, is_quick=False, is_waivable=False)
    for single, about in OTHERS.items():
        yield Check(f"L1/memory/{_name(single)}", single, about, is_waivable=single not in NEVER_WAIVED)
    for uses in USES:
        yield Check(
            f"L1/pack/{'-'.join(uses)}",
            partial(pack_round_trip, uses=uses),
            "a packed parameter unpacks to its canonical array",
            ("routed_experts",) if "experts" in uses else (),
            profile="moe" if "experts" in uses else "dense",
        )


def _name(run: Callable[..., None]) -> str:
    return run.__name__.replace("_", "-")
