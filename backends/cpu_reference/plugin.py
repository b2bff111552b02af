"""The hooks of the reference backend and what it declares."""

from __future__ import annotations

import numpy as np

from backends.cpu_reference.allocator import ReferenceAllocator
from backends.cpu_reference.compiler import ReferenceProgram
from backends.cpu_reference.device import ReferenceDevice, describe
from backends.cpu_reference.ops import ReferenceOps
from core.contract.errors import UnsupportedError
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import CompileRequest, Device, MemoryAllocator, Program
from core.contract.ops import Ops
from core.contract.requests import (
    AllocatorRequest,
    DeviceRequest,
    OpsRequest,
    ProbeRequest,
    SpecRequest,
)
from core.contract.spec import AttentionRules, BackendSpec, CacheRules
from core.contract.types import DeviceInfo, Unavailable

SPEC = BackendSpec(
    name="cpu_reference",
    contract=(0, 1),
    summary="NumPy in float64, the reference that every backend is compared with; slow",
    framework="numpy",
    dtypes=("float64", "float32"),
    accumulator="float64",
    cache=CacheRules(block_sizes=(16, 1, 2, 4, 8, 32, 64, 128, 256)),
    attention=AttentionRules(
        window=True,
        chunk=True,
        soft_cap=True,
        sinks=True,
        non_causal=True,
        q_scale=True,
        lse=True,
        latent=True,
        max_decode_queries=256,
    ),
    state_kinds=("gated_delta",),
    routed_experts=True,
    determinism="batch_invariant",
)


@hookimpl
def core_backend_spec(request: SpecRequest) -> BackendSpec:
    """See `core.contract.hookspecs`."""
    return SPEC


@hookimpl
def core_probe(request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
    """The host, index 0; always there."""
    if request.visible is not None and 0 not in request.visible:
        return Unavailable(
            f"its only device has index 0, and the visible indices are {list(request.visible)}",
            "add 0 to the visible devices",
        )
    return [describe(f"numpy {np.__version__}")]


@hookimpl
def core_open_device(request: DeviceRequest) -> Device:
    """See `core.contract.hookspecs`."""
    return ReferenceDevice(request)


@hookimpl
def core_memory_allocator(request: AllocatorRequest) -> MemoryAllocator:
    """See `core.contract.hookspecs`."""
    return ReferenceAllocator(request.device, request.budget_bytes)


@hookimpl
def core_ops(request: OpsRequest) -> Ops:
    """See `core.contract.hookspecs`. The table's own attention is the reference, so no other is taken."""
    if request.attention is not None:
        raise UnsupportedError(
            f"attention kernel {request.attention.name!r} was chosen for backend 'cpu_reference', which "
            "computes attention itself; choose another backend for this kernel"
        )
    return ReferenceOps(request.dtype)


@hookimpl
def core_compile(request: CompileRequest) -> Program:
    """See `core.contract.hookspecs`."""
    return ReferenceProgram(request)
