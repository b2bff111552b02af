"""The null backend: accepts everything, computes nothing, and watches how it is used.

The token at a position is a pure function, `null_token`, so a test knows every output beforehand. The device
records each step (`NullDevice.log`) and each breach of the contract that it sees (`NullDevice.violations`).

Options of the device: `delay=N`: tokens are ready only after N further steps were submitted, or after
`release()`; `vocab=V`; `eos=ID` with `eos_every=N`; `fail_step=N`: submitting step number N (from 0) raises;
`step_ms=T`: submitting a step takes that long; `memory=BYTES`.
"""

from __future__ import annotations

from core.contract.hookspecs import hookimpl
from core.contract.interfaces import Communicator, CompileRequest, Device, MemoryAllocator, Program, Sampler
from core.contract.ops import Ops
from core.contract.requests import (
    AllocatorRequest,
    CommunicatorRequest,
    DeviceRequest,
    OpsRequest,
    ProbeRequest,
    SamplerRequest,
    SpecRequest,
)
from core.contract.spec import AttentionRules, BackendSpec, BatchRules, CacheRules
from core.contract.types import DeviceInfo, Unavailable
from core_test_plugins.null_device import NullAllocator, NullDevice
from core_test_plugins.null_program import NullCommunicator, NullOps, NullProgram, NullSampler

SPEC = BackendSpec(
    name="null",
    contract=(0, 1),
    summary="computes nothing and watches its caller; for tests",
    framework="numpy",
    dtypes=("float32", "bfloat16", "float16", "float64"),
    batch=BatchRules(adapters=True, input_embeds=True, prefix_groups=True, hidden_states=True),
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
    ),
    state_kinds=("gated_delta",),
    routed_experts=True,
    quantization=("int8", "int4", "fp8"),
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
    lengths_on_device=True,
    device_sampler=True,
    sampler_history=True,
    host_batch=True,
    determinism="bitwise",
    overlap=2,
)


class NullBackend:
    """The hooks. A test that needs other rules registers `NullBackend(replace(SPEC, ...))`."""

    def __init__(self, spec: BackendSpec = SPEC) -> None:
        self.spec = spec

    @hookimpl
    def core_backend_spec(self, request: SpecRequest) -> BackendSpec:
        """See `core.contract.hookspecs`."""
        return self.spec

    @hookimpl
    def core_probe(self, request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
        """As many devices as are visible; one where all are."""
        visible = (0,) if request.visible is None else request.visible
        if not visible:
            return Unavailable("no index is visible", "allow at least one")
        return [DeviceInfo(backend=self.spec.name, index=i, name="null device") for i in visible]

    @hookimpl
    def core_open_device(self, request: DeviceRequest) -> Device:
        """See `core.contract.hookspecs`."""
        return NullDevice(self.spec, request)

    @hookimpl
    def core_memory_allocator(self, request: AllocatorRequest) -> MemoryAllocator:
        """See `core.contract.hookspecs`."""
        return NullAllocator(request.device, request.budget_bytes)

    @hookimpl
    def core_ops(self, request: OpsRequest) -> Ops:
        """See `core.contract.hookspecs`."""
        return NullOps()

    @hookimpl
    def core_compile(self, request: CompileRequest) -> Program:
        """See `core.contract.hookspecs`."""
        return NullProgram(request)

    @hookimpl
    def core_sampler(self, request: SamplerRequest) -> Sampler:
        """See `core.contract.hookspecs`."""
        return NullSampler()

    @hookimpl
    def core_communicator(self, request: CommunicatorRequest) -> Communicator:
        """See `core.contract.hookspecs`."""
        return NullCommunicator(request.rank, request.world_size)


BACKEND = NullBackend()
