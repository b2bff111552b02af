"""L1 and L2: weights that stay quantized: their bits come back, their products are their values'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance import dense
from conformance.bench import Array, Bench, Input
from conformance.check import Check, Context
from conformance.dense import Bounded
from conformance.opcases.base import activations, exactly, table
from conformance.world import World
from core.contract.requests import AllocatorRequest
from core.contract.spec import BackendSpec
from core.contract.types import PackRequest

BLOCK = 32
ROWS, GROUPS = 37, 3
"""Rows of a matrix, and blocks in each."""
WORLD = World((9, 1, 14))
Bytes = npt.NDArray[np.uint8]

NUMBERS: Mapping[str, int] = {"q4_0": 1, "q4_1": 2, "q8_0": 1}
"""Schemes that the contract defines, and the half-precision numbers that a block begins with."""


def blocks(scheme: str, rng: np.random.Generator, numbers: npt.NDArray[np.float16]) -> Bytes:
    """Random quants behind `numbers` [O, G, 1 or 2]: uint8 [O, row bytes]."""
    out, G, _ = numbers.shape
    quants = rng.integers(0, 256, (out, G, 32 if scheme == "q8_0" else 16), np.uint8)
    if scheme == "q8_0":
        quants[quants == 128] = 0  # -128 is in the format, but nobody writes it
    heads = np.ascontiguousarray(numbers).view(np.uint8).reshape(out, G, -1)
    return np.concatenate([heads, quants], -1).reshape(out, -1)


def values(scheme: str, packed: Bytes) -> Array:
    """The matrix [O, I], as `PackRequest` says."""
    count = NUMBERS[scheme]
    size = 2 * count + (32 if scheme == "q8_0" else 16)
    rows = packed.reshape(len(packed), -1, size)
    numbers = np.ascontiguousarray(rows[..., : 2 * count]).view(np.float16).astype(np.float64)
    data = rows[..., 2 * count :]
    d = numbers[..., :1]
    if scheme == "q8_0":
        found = d * data.view(np.int8)
    else:
        q = np.concatenate([data & 15, data >> 4], -1).astype(np.float64)
        found = d * (q - 8) if scheme == "q4_0" else d * q + numbers[..., 1:]
    flat: Array = found.reshape(len(packed), -1)
    return flat


def scales(scheme: str, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Of every size and sign, so that no block's can stand for another's."""
    shape = (ROWS, GROUPS, NUMBERS[scheme])
    signs = rng.choice([-1.0, 1.0], shape)
    return (signs * 10.0 ** rng.uniform(-3, 0, shape)).astype(np.float16)


def bits(context: Context, scheme: str) -> None:
    """What was packed comes back: the same bytes, or the same values."""
    rng = context.rng()
    packed = blocks(scheme, rng, scales(scheme, rng))
    allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
    request = PackRequest(array=packed, uses=("linear",), dtype=context.dtype, name="w", scheme=scheme)
    found = np.asarray(allocator.unpack(allocator.pack(request)))
    wanted = packed if found.dtype == np.uint8 else values(scheme, packed)
    context.equal(found, wanted, f"a matrix in {scheme}")


def product(context: Context, scheme: str) -> None:
    """Within rule A of the values' product, which has no other error."""
    rng = context.rng()
    packed = blocks(scheme, rng, scales(scheme, rng))
    x = exactly(rng.normal(size=(WORLD.num_tokens, GROUPS * BLOCK)))
    _compare(context, scheme, x, packed)


def ends(context: Context, scheme: str) -> None:
    """A scale of 0 makes a block of zeros, and the largest one no infinity."""
    rng = context.rng()
    numbers = scales(scheme, rng)
    numbers[::2, 0] = 0.0
    numbers[1::2, 0] = np.finfo(np.float16).max
    packed = blocks(scheme, rng, numbers)
    x = exactly(rng.normal(size=(WORLD.num_tokens, GROUPS * BLOCK)))
    x[:, :BLOCK] = 0.0
    _compare(context, scheme, x, packed)


def _compare(context: Context, scheme: str, x: Array, packed: Bytes) -> None:
    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, w, step, [slice(None)])
        return ops.linear(given, w["w"]), caches

    inputs = {"x": table(x)[0], "w": Input(packed, ("linear",), scheme)}
    world = WORLD.fitted(context.spec)
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    right = dense.linear(Bounded(x), values(scheme, packed), context.precision)
    context.within(found, right.value, right.error, f"a product with a matrix in {scheme}")


def rows(context: Context, scheme: str) -> None:
    """An embedding in this scheme gives its values, rounded once."""
    world = World((ROWS,)).fitted(context.spec)
    rng = context.rng()
    packed = blocks(scheme, rng, scales(scheme, rng))

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return ops.embed(w["x"], ops.select_tokens(step)), caches

    inputs = {"x": Input(packed, ("embed",), scheme)}
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    wanted, p = values(scheme, packed), context.precision
    # q4_1 adds, in float32 or wider, what may cancel.
    terms = np.abs(wanted) + 16 * np.abs(wanted).max(-1, keepdims=True) * (scheme == "q4_1")
    bound = p.u_out * np.abs(wanted) + 2 * 2.0**-24 * terms + p.tiny
    context.within(found, wanted, bound, f"rows of a table in {scheme}")


ABOUT: Mapping[Callable[..., None], tuple[str, str]] = {
    bits: ("L1/pack/scheme", "a quantized matrix keeps its bits"),
    product: ("L2/packed/linear", "a product with a quantized matrix is that with its values"),
    ends: ("L2/packed/scales", "blocks with a scale of 0, and with the largest, are finite"),
    rows: ("L2/packed/embed", "a quantized table gives its values"),
}


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for scheme in NUMBERS:
        for run, (name, about) in ABOUT.items():
            needs = (f"quantization:{scheme}",)
            yield Check(f"{name}-{scheme}", partial(run, scheme=scheme), f"{scheme}: {about}", needs)
