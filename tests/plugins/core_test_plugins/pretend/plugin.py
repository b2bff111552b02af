"""The pretend backend: dense models in torch on a device whose memory the host can't reach.

It shows that core and the models touch arrays through ops and plain arithmetic alone. torch is imported when
a device is opened.
"""

from __future__ import annotations

from importlib.util import find_spec

from core.contract.hookspecs import hookimpl
from core.contract.interfaces import CompileRequest, Device, MemoryAllocator, Program
from core.contract.ops import Ops
from core.contract.requests import AllocatorRequest, DeviceRequest, OpsRequest, ProbeRequest, SpecRequest
from core.contract.spec import AttentionRules, BackendSpec, CacheRules
from core.contract.types import DeviceInfo, Unavailable

SPEC = BackendSpec(
    name="pretend",
    contract=(0, 1),
    summary="torch on a device that is not there; for tests",
    framework="torch",
    cache=CacheRules(block_sizes=(16, 4, 8)),
    attention=AttentionRules(window=True, soft_cap=True, lse=True),
)


@hookimpl
def core_backend_spec(request: SpecRequest) -> BackendSpec:
    """See `core.contract.hookspecs`."""
    return SPEC


@hookimpl
def core_probe(request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
    """One device, where torch is installed."""
    if find_spec("torch") is None:
        return Unavailable("torch is not installed", "pip install torch")
    return [DeviceInfo(backend="pretend", index=0, name="pretend device")]


@hookimpl
def core_open_device(request: DeviceRequest) -> Device:
    """See `core.contract.hookspecs`."""
    from core_test_plugins.pretend.device import PretendDevice

    return PretendDevice()


@hookimpl
def core_memory_allocator(request: AllocatorRequest) -> MemoryAllocator:
    """See `core.contract.hookspecs`."""
    from core_test_plugins.pretend.device import PretendAllocator

    return PretendAllocator(request.device, request.budget_bytes)


@hookimpl
def core_ops(request: OpsRequest) -> Ops:
    """See `core.contract.hookspecs`."""
    from core_test_plugins.pretend.ops import PretendOps

    return PretendOps()


@hookimpl
def core_compile(request: CompileRequest) -> Program:
    """See `core.contract.hookspecs`."""
    from core_test_plugins.pretend.device import PretendProgram

    return PretendProgram(request)
