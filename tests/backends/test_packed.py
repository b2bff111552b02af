"""Weights that a backend keeps in their quantization scheme: the ops that read them give what the decoded
matrix gives, and they take the memory of their blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from core.contract.errors import UnsupportedError
from core.contract.opspecs import ExpertsSpec, ExpertWeights
from core.contract.requests import AllocatorRequest, OpsRequest
from core.contract.types import PackRequest
from core.weights.checkpoint import BLOCKS
from tests.backends.harness import BACKENDS, device_of, plugin, spec_of

KINDS = {"q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1, "q8_0": Kind.Q8_0}
RUNS = [(backend, scheme) for backend in BACKENDS for scheme in spec_of(backend).quantization]
# More than one tile of rows, the last of them not full.
ROWS, WIDTH = 2100, 512

torch: Any = pytest.importorskip("torch")


def allocator_of(backend: str) -> Any:
    return plugin(backend).core_memory_allocator(AllocatorRequest(device=device_of(backend)))


def ops_of(backend: str, dtype: str = "float32") -> Any:
    return plugin(backend).core_ops(OpsRequest(device=device_of(backend), dtype=dtype))


def matrix(scheme: str, *shape: int) -> tuple[Any, Any]:
    """Random blocks, and their values in float32."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    blocks = quantize(values, KINDS[scheme])
    return blocks, dequantize(blocks, KINDS[scheme])


def packed(backend: str, array: Any, *uses: str, scheme: str = "", dtype: str = "float32") -> Any:
    request = PackRequest(array=array, uses=uses, dtype=dtype, name="w", scheme=scheme)
    return allocator_of(backend).pack(request)


def activations(*shape: int, dtype: Any = None) -> Any:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype or torch.float32)


def within(found: Any, wanted: Any, x: Any, values: Any) -> None:
    """As two sums of float32 products in different orders may differ: 2 u n sum |x w|, with u = 2^-24."""
    bound = 2 * 2.0**-24 * x.shape[-1] * (np.abs(x.float().numpy()) @ np.abs(values).T)
    assert np.all(np.abs(found.float().numpy() - wanted.float().numpy()) <= bound)


def test_some_backend_keeps_every_scheme() -> None:
    assert {scheme for _, scheme in RUNS} == set(KINDS) == set(BLOCKS)


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_products_are_those_of_the_decoded_matrix(backend: str, scheme: str) -> None:
    blocks, values = matrix(scheme, ROWS, WIDTH)
    w = packed(backend, blocks, "linear", scheme=scheme)
    plain = packed(backend, values, "linear")
    ops = ops_of(backend)
    for rows in (1, 8, 33):
        x, h, bias = activations(rows, WIDTH), activations(rows, ROWS), activations(ROWS)
        for found, wanted in (
            (ops.linear(x, w), ops.linear(x, plain)),
            (ops.linear(x, w, bias), ops.linear(x, plain, bias)),
            (ops.linear(x, w, bias, wide=True), ops.linear(x, plain, bias, wide=True)),
            (ops.linear_add(x, w, h.clone(), bias), ops.linear_add(x, plain, h.clone(), bias)),
        ):
            assert found.dtype == wanted.dtype
            within(found, wanted, x, values)


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_a_product_of_unit_vectors_is_the_decoded_matrix_bit_for_bit(backend: str, scheme: str) -> None:
    blocks, values = matrix(scheme, ROWS, WIDTH)
    found = ops_of(backend).linear(torch.eye(WIDTH), packed(backend, blocks, "linear", scheme=scheme))
    assert np.array_equal(found.numpy().T, values)


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_half_precision_activations_meet_weights_that_are_not_rounded(backend: str, scheme: str) -> None:
    blocks, values = matrix(scheme, 96, WIDTH)
    w = packed(backend, blocks, "linear", scheme=scheme, dtype="bfloat16")
    x, ops = activations(5, WIDTH, dtype=torch.bfloat16), ops_of(backend, "bfloat16")
    wanted = x.float() @ torch.from_numpy(values).T
    wide = ops.linear(x, w, wide=True)
    assert wide.dtype == torch.float32 and ops.linear(x, w).dtype == torch.bfloat16
    within(wide, wanted, x, values)
    assert torch.equal(ops.linear(x, w), wide.bfloat16())


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_look_ups_are_the_decoded_rows(backend: str, scheme: str) -> None:
    blocks, values = matrix(scheme, 96, WIDTH)
    w = packed(backend, blocks, "embed", "linear", scheme=scheme)
    ids = np.array([0, 95, 3, 3, 100, 2], np.int32)
    found = ops_of(backend).embed(w, torch.from_numpy(ids), 2).numpy()
    inside = (ids >= 2) & (ids < 98)
    wanted = np.where(inside[:, None], values[np.clip(ids - 2, 0, 95)], 0)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_experts_are_those_of_the_decoded_matrices(backend: str, scheme: str) -> None:
    E, D, F, T = 4, 64, 96, 7
    sizes = ((E, 2 * F, D), (E, D, F))
    made = [matrix(scheme, *size) for size in sizes]
    kept = [packed(backend, blocks, "experts", scheme=scheme) for blocks, _ in made]
    plain = [packed(backend, values, "experts") for _, values in made]
    x = activations(T, D) / 8
    ids = torch.tensor([[t % E, (t + 1) % E] for t in range(T)], dtype=torch.int32)
    weights = torch.full((T, 2), 0.5)
    ops, spec = ops_of(backend), ExpertsSpec(num_experts=E, activation="silu")
    found, wanted = (ops.experts(x, ids, weights, ExpertWeights(*pair), spec) for pair in (kept, plain))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("backend", "scheme"), RUNS)
def test_memory_is_that_of_the_blocks_until_nothing_refers_to_them(backend: str, scheme: str) -> None:
    blocks, values = matrix(scheme, 64, WIDTH)
    allocator = allocator_of(backend)
    request = PackRequest(array=blocks, uses=("linear",), dtype="float32", name="w", scheme=scheme)
    w = allocator.pack(request)
    size, num_bytes = BLOCKS[scheme]
    assert allocator.used_bytes() == blocks.nbytes == values.size // size * num_bytes
    assert w.nbytes == blocks.nbytes
    assert np.array_equal(allocator.unpack(w), blocks)
    blocks[:] = 0
    assert allocator.unpack(w).any(), "the packed weight must own its memory"
    del w
    assert allocator.used_bytes() == 0


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in RUNS}))
def test_an_unknown_scheme_is_refused_with_those_that_are_kept(backend: str) -> None:
    with pytest.raises(UnsupportedError, match=r"w is quantized with 'q2_k'.*q4_0, q4_1, q8_0"):
        packed(backend, np.zeros((2, 84), np.uint8), "linear", scheme="q2_k")
