"""The hooks of backend `tile`, and what it declares. Nothing here imports a vendor library."""

from __future__ import annotations

from pathlib import Path

from core.contract.errors import UnsupportedError
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import CompileRequest, Device, MemoryAllocator, Program
from core.contract.ops import Ops
from core.contract.requests import (
    AllocatorRequest,
    ConformanceExtras,
    ConformanceRequest,
    DeviceRequest,
    Floor,
    OpsRequest,
    ProbeRequest,
    SpecRequest,
)
from core.contract.spec import AttentionRules, BackendSpec, BatchRules, CacheRules, ShapeRules
from core.contract.types import DeviceInfo, Unavailable

# What is not declared is never asked for, and is refused if it is.
SPEC = BackendSpec(
    name="tile",
    contract=(0, 1),
    summary="an example, played by NumPy: tiles of 64 tokens, prompts or decodes, fixed shapes",
    framework="numpy",
    dtypes=("float32",),
    batch=BatchRules(mixed=False, max_prefills=1, max_tokens=256, max_requests=8),
    shapes=ShapeRules(
        kind="static", token_buckets=(64, 256), request_buckets=(1, 4, 8), width_buckets=(1, 2, 4, 8)
    ),
    cache=CacheRules(block_sizes=(64,)),
    attention=AttentionRules(window=True, soft_cap=True, lse=True),
)


@hookimpl
def core_backend_spec(request: SpecRequest) -> BackendSpec:
    """What this backend can do."""
    return SPEC


@hookimpl
def core_probe(request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
    """Devices of this machine that the user allows; no context is opened."""
    from core_tile.device import find_devices

    visible = request.visible
    found = [info for info in find_devices() if visible is None or info.index in visible]
    return found or Unavailable("no tile is visible", "check which devices are visible")


@hookimpl
def core_open_device(request: DeviceRequest) -> Device:
    """Open a device."""
    from core_tile.device import HostDevice

    return HostDevice(request)


@hookimpl
def core_memory_allocator(request: AllocatorRequest) -> MemoryAllocator:
    """The owner of a model's device memory."""
    from core_tile.allocator import Allocator

    return Allocator(request.device, request.budget_bytes)


@hookimpl
def core_ops(request: OpsRequest) -> Ops:
    """The op table."""
    from core_tile.ops import Table

    if request.dtype not in SPEC.dtypes:
        raise UnsupportedError(f"backend 'tile' does not compute in {request.dtype!r}; it has {SPEC.dtypes}")
    return Table()


@hookimpl
def core_compile(request: CompileRequest) -> Program:
    """A program for one bucket."""
    from core_tile.compiler import TileProgram

    return TileProgram(request)


@hookimpl
def core_conformance(request: ConformanceRequest) -> ConformanceExtras:
    """Where this backend's waivers are, and the speed that it never falls below."""
    return ConformanceExtras(
        waivers=str(Path(__file__).with_name("waivers.toml")), floors=(Floor(measure="products", value=1e8),)
    )
