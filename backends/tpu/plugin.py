"""Entry point of the backend: what it declares, and factories that import jax when they are called.

Spec and probe import neither jax nor libtpu, so they answer at once on any machine.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from core.contract.hookspecs import hookimpl
from core.contract.requests import (
    AllocatorRequest,
    AttentionKernelRequest,
    DeviceRequest,
    OpsRequest,
    ProbeRequest,
    SpecRequest,
)
from core.contract.spec import AttentionRules, BackendSpec, BatchRules, CacheRules, ShapeRules
from core.contract.types import DeviceInfo, Unavailable

if TYPE_CHECKING:
    from backends.tpu.allocator import TpuAllocator
    from backends.tpu.attention import PagedAttention
    from backends.tpu.compiler import TpuProgram
    from backends.tpu.device import TpuDevice
    from backends.tpu.ops import TpuOps
    from core.contract.interfaces import CompileRequest

MAX_TOKENS = 2048
MAX_REQUESTS = 64


def _powers_of_two(last: int) -> tuple[int, ...]:
    return tuple(2**i for i in range(last.bit_length()))


SPEC = BackendSpec(
    name="tpu",
    contract=(0, 1),
    summary="jax, compiled once per bucket; plain attention, runs on any jax platform",
    framework="jax",
    process_model="single_controller",
    dtypes=("float32", "bfloat16"),
    batch=BatchRules(mixed=True, max_tokens=MAX_TOKENS, max_requests=MAX_REQUESTS),
    shapes=ShapeRules(
        kind="bucketed",
        token_buckets=_powers_of_two(MAX_TOKENS),
        request_buckets=_powers_of_two(MAX_REQUESTS),
        width_buckets=_powers_of_two(8192),
    ),
    cache=CacheRules(block_sizes=(16, 8, 32, 64, 128)),
    attention=AttentionRules(
        window=True,
        chunk=True,
        soft_cap=True,
        sinks=True,
        non_causal=True,
        q_scale=True,
        lse=True,
        latent=True,
        max_decode_queries=16,
    ),
    state_kinds=("gated_delta",),
    routed_experts=True,
    determinism="bitwise",
    overlap=2,
)


@hookimpl
def core_backend_spec(request: SpecRequest) -> BackendSpec:
    """The constant `SPEC`."""
    return SPEC


@hookimpl
def core_probe(request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
    """Chips that the kernel driver shows where libtpu is installed; otherwise jax's CPU platform, index 0."""
    if importlib.util.find_spec("jax") is None:
        return Unavailable("the package jax is not installed", "pip install core[tpu-cpu]")
    chips: list[Path] = []
    if importlib.util.find_spec("libtpu") is not None:
        chips = sorted(Path("/dev").glob("accel[0-9]*")) or sorted(Path("/dev/vfio").glob("[0-9]*"))
    names = [f"TPU chip {i}" for i in range(len(chips))] or ["host processor (jax CPU platform)"]
    found = [
        DeviceInfo(
            backend=SPEC.name,
            index=i,
            name=name,
            driver=_jax_version(),
            execution="native" if chips else "emulated",
        )
        for i, name in enumerate(names)
        if request.visible is None or i in request.visible
    ]
    if not found:
        return Unavailable(
            f"none of the {len(names)} device(s) is among the allowed indices {request.visible}",
            f"allow an index from 0 to {len(names) - 1}",
        )
    return found


def _jax_version() -> str:
    try:
        return f"jax {version('jax')}"
    except PackageNotFoundError:
        return "jax"


@hookimpl
def core_open_device(request: DeviceRequest) -> TpuDevice:
    """Open a jax device.

    The option "platform" (cpu, tpu, gpu) chooses among jax's platforms; default: jax's own choice.
    """
    from backends.tpu.device import open_device

    return open_device(request)


@hookimpl
def core_memory_allocator(request: AllocatorRequest) -> TpuAllocator:
    """Caches as one array per layer and weights as jax arrays."""
    from backends.tpu.allocator import TpuAllocator

    return TpuAllocator(request.device, request.budget_bytes)


@hookimpl
def core_ops(request: OpsRequest) -> TpuOps:
    """The op table in jax.numpy."""
    from backends.tpu.ops import TpuOps

    return TpuOps(request.dtype, request.attention)


@hookimpl
def core_attention_kernel(request: AttentionKernelRequest) -> PagedAttention | None:
    """The plain kernel, for every paged layer of this backend's devices."""
    if request.device.info.backend != SPEC.name:
        return None
    from backends.tpu.attention import PagedAttention

    kernel = PagedAttention()
    return kernel if kernel.supports(request.layer, request.attention) else None


@hookimpl
def core_compile(request: CompileRequest) -> TpuProgram:
    """A Program whose step is compiled at `warm` or at its first run."""
    from backends.tpu.compiler import TpuProgram

    return TpuProgram(request)
