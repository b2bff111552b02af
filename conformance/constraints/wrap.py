"""A backend under a profile: the same hooks, with the profile's rules declared and every step watched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType, ModuleType
from typing import Any

from conformance.constraints.rules import narrow, profile_of
from conformance.constraints.watch import Watch
from core.contract.batch import StepBatch
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import (
    CompileRequest,
    DeviceTokens,
    MemoryAllocator,
    Program,
    StepOutput,
)
from core.contract.ops import Ops
from core.contract.requests import AllocatorRequest, OpsRequest, SpecRequest
from core.contract.spec import BackendSpec
from core.contract.types import CachePlan, SamplingBatch, State
from core.plugins import BackendHandle, Plugins


def constrained(handle: BackendHandle, name: str) -> tuple[BackendHandle, Watch]:
    """The backend once more, under the profile `name`, in plugins of its own.

    It runs in this process alone.

    Raises:
        ConfigError: there is no such profile.
    """
    profile = profile_of(name)
    watch = Watch(profile, narrow(handle.spec, profile))
    return watched(handle, watch), watch


def watched(handle: BackendHandle, watch: Watch) -> BackendHandle:
    """The backend once more, declaring the watch's rules and seen by it."""
    plugin = handle.plugins.plugin(handle.name)
    plugins = Plugins(disabled=frozenset())
    return plugins.register_backend(_wrapped(plugin, watch.narrowed.spec, watch), handle.name)


def _wrapped(plugin: Any, spec: BackendSpec, watch: Watch) -> ModuleType:
    found = ModuleType(getattr(plugin, "__name__", type(plugin).__module__))
    for name in dir(plugin):
        if name.startswith("core_"):
            setattr(found, name, getattr(plugin, name))

    @hookimpl
    def core_backend_spec(request: SpecRequest) -> BackendSpec:
        return spec

    @hookimpl
    def core_memory_allocator(request: AllocatorRequest) -> MemoryAllocator:
        allocator: MemoryAllocator = _Allocator(plugin.core_memory_allocator(request), watch)
        return allocator

    @hookimpl
    def core_ops(request: OpsRequest) -> Ops:
        table: Any = plugin.core_ops(request)
        table.attend = partial(watch.attend, table.attend)
        # A fused form of a backend's own would pass `attend` by; its composite does the same.
        table.norm_rope_attend = MethodType(Ops.norm_rope_attend, table)
        ops: Ops = table
        return ops

    @hookimpl
    def core_compile(request: CompileRequest) -> Program:
        return _Program(plugin.core_compile(request), watch)

    for hook in (core_backend_spec, core_memory_allocator, core_ops, core_compile):
        setattr(found, hook.__name__, hook)
    return found


class _Allocator:
    """The backend's allocator, whose changes of caches the watch follows."""

    def __init__(self, inner: MemoryAllocator, watch: Watch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def allocate_state(self, plan: CachePlan) -> State:
        self._watch.allocated(plan)
        return self._inner.allocate_state(plan)

    def free_state(self, state: State) -> None:
        self._watch.freed()
        self._inner.free_state(state)

    def copy_blocks(self, state: State, group: int, src: Sequence[int], dst: Sequence[int]) -> State:
        self._watch.copied(group, src, dst)
        return self._inner.copy_blocks(state, group, src, dst)


class _Program:
    """The backend's program; each of its steps is watched."""

    def __init__(self, inner: Program, watch: Watch) -> None:
        self._inner, self._watch = inner, watch
        self._is_warm = False

    def warm(self, state: State) -> State:
        """See the protocol."""
        self._is_warm = True
        return self._inner.warm(state)

    def run(self, batch: StepBatch, state: State) -> tuple[StepOutput, State]:
        """See the protocol."""
        with self._watch.step(batch, self._is_warm):
            return self._inner.run(batch, state)

    def sample(
        self, output: StepOutput, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol."""
        return self._inner.sample(output, batch, sampling, state)

    def run_and_sample(
        self, batch: StepBatch, sampling: SamplingBatch, state: State
    ) -> tuple[DeviceTokens, State]:
        """See the protocol."""
        with self._watch.step(batch, self._is_warm):
            return self._inner.run_and_sample(batch, sampling, state)
