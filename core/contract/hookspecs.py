"""Every hook: the manual for backend authors.

A plugin is a module (or object) named by an entry point of the group `core.backends` (backends) or
`core.plugins` (add-on attention kernels, observers, commands). Its hook implementations are functions marked
with `@hookimpl`. Every hook takes exactly one argument, `request`, a frozen record; growth is a new defaulted
field of that record. A backend states the contract version that it was built for in `BackendSpec.contract`,
an add-on in an attribute `CONTRACT` of the module.

For backends, all hooks marked *selected* are called on the chosen backend only, so registration order never
matters.
Required of a backend: core_backend_spec, core_probe, core_open_device, core_memory_allocator, core_ops,
core_compile. A hook that core needs and that is absent is an error with its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pluggy

from core.contract.interfaces import (
    AttentionKernel,
    Communicator,
    CompileRequest,
    Device,
    MemoryAllocator,
    Observer,
    Program,
    Sampler,
)
from core.contract.ops import Ops
from core.contract.requests import (
    AllocatorRequest,
    AttentionKernelRequest,
    CliRequest,
    CommunicatorRequest,
    ConformanceExtras,
    ConformanceRequest,
    DeviceRequest,
    ObserverRequest,
    OpsRequest,
    OverrideRequest,
    ProbeRequest,
    SamplerRequest,
    SpecRequest,
)
from core.contract.spec import BackendSpec
from core.contract.types import DeviceInfo, Unavailable

PROJECT = "core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendHooks(Protocol):
    """Hooks that every backend implements."""

    @hookspec
    def core_backend_spec(self, request: SpecRequest) -> BackendSpec:
        """Say everything about the backend, as data.

        When: first, at discovery, in every process, also on machines without the hardware.
        Returns: the same value at each call; cheap (no vendor import, no file, no environment).
        Must not: import the vendor's library or a framework, or look for devices.
        If absent: the plugin is refused.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_probe(self, request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
        """Find devices.

        When: for `backend="auto"`, `core backends` and `core doctor`; may run in a child process.
        Given: the indices that the user allows.
        Returns: at least one DeviceInfo, or why there is none and what to do about it.
        Must not: create a driver context, allocate device memory, or raise when there is no device.
        If absent: the plugin is refused.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_open_device(self, request: DeviceRequest) -> Device:
        """Open one device for this process.

        When: selected; once per rank before anything else below.
        Returns: an open Device; the caller closes it.
        Must not: load a model or read environment variables that belong to core.
        If absent: the plugin is refused. Raises: DeviceError with the driver's reason.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_memory_allocator(self, request: AllocatorRequest) -> MemoryAllocator:
        """Make the allocator of one model's caches, state and weights.

        When: selected; once per model and device.
        Given: the device and a budget in bytes (None = what is free).
        If absent: the plugin is refused.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_ops(self, request: OpsRequest) -> Ops:
        """Make the op table for one compute dtype.

        When: selected; once per model and device.
        Given: the device, the dtype, and the attention kernel to use (None = the table's own).
        Returns: a table with every plain op; inherited composites are counted and shown.
        If absent: the plugin is refused.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_compile(self, request: CompileRequest) -> Program:
        """Turn a pure step function into a Program for one bucket.

        When: selected; at warm-up for static backends, otherwise when a bucket is first needed.
        Given: the function, op table, packed weights, the device's state, layout and samplers.
        Returns: a Program; compilation may wait until `warm`.
        Must not: keep the state (only the runner holds it), or depend on real row counts: one compilation per
        bucket.
        If absent: the plugin is refused.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")


class OptionalHooks(Protocol):
    """Hooks that a backend or an add-on may implement."""

    @hookspec
    def core_attention_kernel(self, request: AttentionKernelRequest) -> AttentionKernel | None:
        """Offer an attention kernel for a cache layer; add-ons may offer one for another backend's device.

        When: not asked for by this version of core. Later once per kind of cache layer; which offer runs is
            a stored choice, never registration order.
        Returns: a kernel, or None for a geometry or device that it does not serve.
        If absent: the backend's own `attend` runs.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_communicator(self, request: CommunicatorRequest) -> Communicator:
        """Join a group of ranks.

        When: selected; once per group and rank, for world sizes above one.
        Given: group, rank, size, and where to meet.
        If absent: `max_world_size` must be 1; more is refused before weights are loaded.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_sampler(self, request: SamplerRequest) -> Sampler:
        """Make the device sampler.

        When: selected; once per model and device, where the spec declares `device_sampler`.
        Must: agree with the reference sampler token by token on equal logits.
        If absent: the reference sampler runs on the host, and `core doctor` says so.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_model_override(self, request: OverrideRequest) -> Any | None:
        """Offer a replacement step function where a fusion beyond ops pays.

        When: selected; not asked for by this version of core. Later once per model, before compilation.
        Returns: a StepFunction held to the same bounds as the model's own, or None.
        If absent: the model's own function runs.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_conformance(self, request: ConformanceRequest) -> ConformanceExtras:
        """Name the vendor's waivers and extra cases.

        When: selected; by the conformance suite only.
        If absent: no waivers, no extra cases.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_cli(self, request: CliRequest) -> None:
        """Add commands or options to the command line.

        When: once, at the start of `core`; on every plugin.
        Must not: import a framework, or do work before its command runs.
        If absent: nothing is added.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")

    @hookspec
    def core_observer(self, request: ObserverRequest) -> Sequence[Observer]:
        """Give callbacks of the step loop.

        When: once, when an engine starts; on every plugin.
        Returns: observers; the loop calls them directly afterwards.
        If absent: nothing is observed.
        Since: 0.1
        """
        raise AssertionError("a hook specification is never called")


REQUIRED_HOOKS = tuple(n for n in vars(BackendHooks) if n.startswith("core_"))
OPTIONAL_HOOKS = tuple(n for n in vars(OptionalHooks) if n.startswith("core_"))
