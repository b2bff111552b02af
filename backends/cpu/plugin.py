"""torch on the CPU: the hooks. Nothing here imports torch before a device is opened."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from backends.cpu import device as cpu_device
from core.contract.errors import UnsupportedError
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import (
    AttentionKernel,
    Communicator,
    CompileRequest,
    Device,
    MemoryAllocator,
    Program,
)
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec
from core.contract.requests import (
    AllocatorRequest,
    AttentionKernelRequest,
    CommunicatorRequest,
    ConformanceExtras,
    ConformanceRequest,
    DeviceRequest,
    Floor,
    OpsRequest,
    ProbeRequest,
    SpecRequest,
)
from core.contract.spec import AttentionRules, BackendSpec, CacheRules
from core.contract.types import DeviceInfo, Unavailable

SPEC = BackendSpec(
    name="cpu",
    contract=(0, 1),
    summary="torch on the CPU: float32 and bfloat16, any model that core knows",
    framework="torch",
    auto_rank=10,
    dtypes=("float32", "bfloat16"),
    accumulator="float32",
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
        max_decode_queries=16,
        probability="compute",
    ),
    state_kinds=("gated_delta",),
    routed_experts=True,
    quantization=("q4_0", "q4_1", "q8_0"),
    collectives=(
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "send",
        "receive",
        "barrier",
    ),
    max_world_size=64,
    host_batch=True,
)


@hookimpl
def core_backend_spec(request: SpecRequest) -> BackendSpec:
    """See `core.contract.hookspecs`."""
    return SPEC


@hookimpl
def core_probe(request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
    """One device, the host itself, where torch is installed."""
    if request.visible is not None and 0 not in request.visible:
        return Unavailable(
            f"the only device has index 0, and the visible indices are {list(request.visible)}",
            "add 0 to the visible devices",
        )
    if find_spec("torch") is None:
        return Unavailable("torch is not installed", "pip install core[cpu]")
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "unknown"
    return [cpu_device.describe(0, f"torch {torch_version}")]


@hookimpl
def core_open_device(request: DeviceRequest) -> Device:
    """See `core.contract.hookspecs`."""
    return cpu_device.CpuDevice(request)


@hookimpl
def core_memory_allocator(request: AllocatorRequest) -> MemoryAllocator:
    """See `core.contract.hookspecs`."""
    from backends.cpu.allocator import CpuAllocator

    return CpuAllocator(request.device, request.budget_bytes)


@hookimpl
def core_ops(request: OpsRequest) -> Ops:
    """See `core.contract.hookspecs`."""
    from backends.cpu.ops import CpuOps

    return CpuOps(request.dtype, request.attention)


@hookimpl
def core_attention_kernel(request: AttentionKernelRequest) -> AttentionKernel | None:
    """The kernel that `attend` runs anyway, by name; latent attention is the op table's own."""
    from backends.cpu.attention import CpuAttention

    kernel = CpuAttention()
    spec = request.attention
    return kernel if isinstance(spec, AttentionSpec) and kernel.supports(request.layer, spec) else None


@hookimpl
def core_compile(request: CompileRequest) -> Program:
    """See `core.contract.hookspecs`."""
    from backends.cpu.compiler import CpuProgram

    return CpuProgram(request)


@hookimpl
def core_communicator(request: CommunicatorRequest) -> Communicator:
    """See `core.contract.hookspecs`."""
    from backends.cpu.communicator import GlooCommunicator

    if request.world_size > SPEC.max_world_size:
        raise UnsupportedError(
            f"a group of {request.world_size} ranks was asked for, but backend 'cpu' declares "
            f"{SPEC.max_world_size} at most; use fewer"
        )
    return GlooCommunicator(request)


@hookimpl
def core_conformance(request: ConformanceRequest) -> ConformanceExtras:
    """Floors for one thread of any processor: what falls below them has lost its vector code."""
    floors = {
        "products": 4e9,
        "decode_attention": 3e8,
        "prefill_attention": 4e9,
        "block_copies": 1e9,
        "engine": 500,
    }
    return ConformanceExtras(floors=tuple(Floor(measure=m, value=v) for m, v in floors.items()))
