"""Plugins: discovery, version gate, selection, tracing; one typed method per hook.

Nothing is silent: a plugin that cannot be used is remembered with its reason, shown by `core doctor`, and an
error, with its
root cause, once it is asked for by name. Backends are called one by one by name, so the order of registration
never matters.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from core.contract import CONTRACT, OLDEST_MINOR
from core.contract.errors import ContractVersionError, CoreError, PluginError, UnsupportedError
from core.contract.hookspecs import OPTIONAL_HOOKS, PROJECT, REQUIRED_HOOKS, BackendHooks, OptionalHooks
from core.contract.interfaces import (
    AttentionKernel,
    Communicator,
    CompileRequest,
    Device,
    MemoryAllocator,
    Observer,
    Program,
    Sampler,
    StepFunction,
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
from core.env import debug_level, disabled_plugins

BACKENDS, ADDONS = "core.backends", "core.plugins"


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that cannot be used, and why, in one sentence."""

    name: str
    reason: str
    error: Exception


@dataclass(frozen=True)
class Selection:
    """The backend that was chosen, its devices, and why."""

    spec: BackendSpec
    devices: tuple[DeviceInfo, ...]
    reason: str


class Plugins:
    """The plugins of one process. `load` looks for installed ones; `register` adds one by hand.

    Args:
        contract, oldest_minor: the window of contract versions to accept.
    """

    def __init__(self, *, contract: tuple[int, int] = CONTRACT, oldest_minor: int = OLDEST_MINOR) -> None:
        self._contract = contract
        self._oldest_minor = oldest_minor
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(BackendHooks)
        self._manager.add_hookspecs(OptionalHooks)
        self._specs: dict[str, BackendSpec] = {}
        self._failures: dict[str, LoadFailure] = {}
        if debug_level() >= 2:
            self._manager.add_hookcall_monitoring(*_Tracer().callbacks)

    def load(self) -> None:
        """Register every installed plugin that is not disabled. One that fails does not disturb the others."""
        disabled = disabled_plugins()
        for group in (BACKENDS, ADDONS):
            for entry in sorted(entry_points(group=group), key=lambda e: e.name):
                if entry.name not in disabled:
                    self._load_entry(entry, is_backend=group == BACKENDS)

    def _load_entry(self, entry: EntryPoint, *, is_backend: bool) -> None:
        try:
            plugin = entry.load()
        except Exception as error:
            self._fail(entry.name, f"importing {entry.value} failed: {type(error).__name__}: {error}", error)
            return
        try:
            self.register(entry.name, plugin, is_backend=is_backend)
        except CoreError as error:
            self._fail(entry.name, str(error), error)

    def _fail(self, name: str, reason: str, error: Exception) -> None:
        self._failures[name] = LoadFailure(name, reason, error)

    def register(self, name: str, plugin: object, *, is_backend: bool = True) -> None:
        """Add a plugin: a module, or an object with hook implementations.

        Raises:
            PluginError: a hook's name or signature is wrong, a required one is missing, or the name is taken.
            ContractVersionError: it was built for a contract outside the window.
        """
        if self._manager.has_plugin(name):
            raise PluginError(f"two plugins are named {name!r}; uninstall or disable one of them")
        self._check_hook_names(name, plugin)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=name)
            raise PluginError(f"plugin {name!r}: {error}") from error
        if is_backend:
            try:
                self._specs[name] = self._accept(name, plugin)
            except CoreError:
                self._manager.unregister(name=name)
                raise

    def _check_hook_names(self, name: str, plugin: object) -> None:
        known = (*REQUIRED_HOOKS, *OPTIONAL_HOOKS)
        for attribute in dir(plugin):
            is_hook = self._manager.parse_hookimpl_opts(plugin, attribute) is not None
            if is_hook and attribute not in known:
                close = difflib.get_close_matches(attribute, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"hooks are {', '.join(known)}"
                raise PluginError(f"plugin {name!r} implements {attribute!r}, which is no hook; {hint}")

    def _accept(self, name: str, plugin: object) -> BackendSpec:
        missing = [hook for hook in REQUIRED_HOOKS if not self._implements(name, hook)]
        if missing:
            raise PluginError(f"backend {name!r} does not implement {', '.join(missing)}; implement them")
        try:
            spec = cast(
                BackendSpec, self._call(name, "core_backend_spec", SpecRequest(contract=self._contract))
            )
        except Exception as error:
            raise PluginError(f"backend {name!r}: core_backend_spec failed: {error}") from error
        if not isinstance(spec, BackendSpec):
            raise PluginError(
                f"backend {name!r}: core_backend_spec gave a {type(spec).__name__}; return a BackendSpec"
            )
        self._check_version(name, spec.contract)
        if spec.name != name:
            raise PluginError(
                f"backend {name!r} calls itself {spec.name!r}; make the entry point and the spec agree"
            )
        return spec

    def _check_version(self, name: str, built_for: tuple[int, int]) -> None:
        major, minor = self._contract
        if built_for[0] == major and self._oldest_minor <= built_for[1] <= minor:
            return
        newer = built_for > self._contract
        fix = "upgrade core" if newer else f"install a version of {name!r} built for a newer contract"
        raise ContractVersionError(
            f"plugin {name!r} was built for contract {built_for[0]}.{built_for[1]}, but this core loads "
            f"{major}.{self._oldest_minor} to {major}.{minor}; {fix}"
        )

    @property
    def failures(self) -> tuple[LoadFailure, ...]:
        """Plugins that cannot be used, by name."""
        return tuple(self._failures[name] for name in sorted(self._failures))

    def specs(self) -> tuple[BackendSpec, ...]:
        """Every usable backend, by name."""
        return tuple(self._specs[name] for name in sorted(self._specs))

    def backend(self, name: str) -> BackendHandle:
        """A backend by name.

        Raises:
            PluginError: it is not installed, is disabled, or failed to load (with its root cause).
        """
        self._require(name)
        return BackendHandle(self, self._specs[name])

    def _require(self, name: str) -> None:
        if name in self._specs:
            return
        if name in self._failures:
            failure = self._failures[name]
            raise PluginError(
                f"backend {name!r} was asked for but cannot be used: {failure.reason}"
            ) from failure.error
        if name in disabled_plugins():
            raise PluginError(
                f"backend {name!r} is disabled by CORE_DISABLE_PLUGINS; take it out of that list"
            )
        have = ", ".join(sorted(self._specs)) or "none"
        raise PluginError(
            f"backend {name!r} is not installed; installed are {have}; try pip install 'core[{name}]'"
        )

    def select(self, name: str = "auto") -> Selection:
        """The backend to use: by name, or the highest `auto_rank` whose probe gives devices.

        Raises:
            PluginError: the named one cannot be used or has no device, two are tied, or there is none.
        """
        if name != "auto":
            self._require(name)
            found = self.probe(name, ProbeRequest())
            if isinstance(found, Unavailable):
                raise PluginError(f"backend {name!r} has no device: {found.reason}. {found.remedy}".rstrip())
            return Selection(self._specs[name], tuple(found), "asked for by name")
        return self._select_auto()

    def _select_auto(self) -> Selection:
        reasons: list[str] = []
        best: list[Selection] = []
        ranked = [(s.auto_rank, s) for s in self.specs() if s.auto_rank is not None]
        for rank, spec in sorted(ranked, key=lambda pair: -pair[0]):
            if best and rank < (best[0].spec.auto_rank or 0):
                break
            found = self.probe(spec.name, ProbeRequest())
            if isinstance(found, Unavailable):
                reasons.append(f"{spec.name}: {found.reason}")
                continue
            passed = f"; passed over {'; '.join(reasons)}" if reasons else ""
            best.append(Selection(spec, tuple(found), f"highest rank with a device, {rank}{passed}"))
        if len(best) > 1:
            names = " and ".join(repr(s.spec.name) for s in best)
            raise PluginError(f"backends {names} have the same rank; choose one with backend=")
        if not best:
            reasons += [f"{f.name}: {f.reason}" for f in self.failures]
            raise PluginError(
                f"no backend can be chosen automatically ({'; '.join(reasons) or 'none is installed'}); "
                "install one, for example pip install 'core[cpu]', or name one with backend="
            )
        return best[0]

    # One method per hook. The first argument names the backend.

    def probe(self, name: str, request: ProbeRequest) -> list[DeviceInfo] | Unavailable:
        """`core_probe`; a probe that raises counts as Unavailable with its error as the reason."""
        self._require(name)
        try:
            found = self._call(name, "core_probe", request)
        except Exception as error:
            return Unavailable(f"the probe failed: {type(error).__name__}: {error}")
        if isinstance(found, Unavailable):
            return found
        return list(found) if found else Unavailable("the probe found no device")

    def open_device(self, name: str, request: DeviceRequest) -> Device:
        """`core_open_device`."""
        return cast(Device, self._selected(name, "core_open_device", request))

    def memory_allocator(self, name: str, request: AllocatorRequest) -> MemoryAllocator:
        """`core_memory_allocator`."""
        return cast(MemoryAllocator, self._selected(name, "core_memory_allocator", request))

    def ops(self, name: str, request: OpsRequest) -> Ops:
        """`core_ops`."""
        return cast(Ops, self._selected(name, "core_ops", request))

    def compile(self, name: str, request: CompileRequest) -> Program:
        """`core_compile`."""
        return cast(Program, self._selected(name, "core_compile", request))

    def communicator(self, name: str, request: CommunicatorRequest) -> Communicator:
        """`core_communicator`. Raises UnsupportedError where the backend has none."""
        self._require(name)
        if not self._implements(name, "core_communicator"):
            raise UnsupportedError(
                f"backend {name!r} has no communicator, so it runs one rank only; use tensor_parallel=1"
            )
        return cast(Communicator, self._selected(name, "core_communicator", request))

    def sampler(self, name: str, request: SamplerRequest) -> Sampler | None:
        """`core_sampler`; None where the backend has none."""
        self._require(name)
        return cast("Sampler | None", self._optional(name, "core_sampler", request))

    def attention_kernels(self, request: AttentionKernelRequest) -> list[tuple[str, AttentionKernel]]:
        """`core_attention_kernel` of every plugin: (plugin's name, kernel) by name."""
        return [
            (name, cast(AttentionKernel, kernel))
            for name, kernel in self._each("core_attention_kernel", request)
            if kernel is not None
        ]

    def model_override(self, name: str, request: OverrideRequest) -> StepFunction | None:
        """`core_model_override`; None where the backend has none for this model."""
        self._require(name)
        return cast("StepFunction | None", self._optional(name, "core_model_override", request))

    def conformance(self, name: str, request: ConformanceRequest) -> ConformanceExtras:
        """`core_conformance`; empty where the backend has none."""
        self._require(name)
        return cast(
            ConformanceExtras, self._optional(name, "core_conformance", request) or ConformanceExtras()
        )

    def cli(self, app: Any) -> None:
        """`core_cli` of every plugin."""
        self._each("core_cli", CliRequest(app=app))

    def observers(self, request: ObserverRequest) -> list[Observer]:
        """`core_observer` of every plugin, in one list."""
        each = self._each("core_observer", request)
        return [o for _, some in each for o in cast("Sequence[Observer]", some)]

    def _implements(self, name: str, hook: str) -> bool:
        return any(c.name == hook for c in self._manager.get_hookcallers(self._plugin(name)) or ())

    def _plugin(self, name: str) -> object:
        return self._manager.get_plugin(name)

    def _selected(self, name: str, hook: str, request: object) -> object:
        self._require(name)
        found = self._call(name, hook, request)
        if found is None:
            raise PluginError(f"backend {name!r}: {hook} gave nothing; it must return an object")
        return found

    def _optional(self, name: str, hook: str, request: object) -> object | None:
        return self._call(name, hook, request) if self._implements(name, hook) else None

    def _each(self, hook: str, request: object) -> list[tuple[str, object]]:
        names = sorted(name for name, _ in self._manager.list_name_plugin())
        return [(n, self._call(n, hook, request)) for n in names if self._implements(n, hook)]

    def _call(self, name: str, hook: str, request: object) -> Any:
        """Call one plugin's implementation of a hook, through pluggy so that it is traced."""
        chosen = self._plugin(name)
        others = [p for p in self._manager.get_plugins() if p is not chosen]
        found = self._manager.subset_hook_caller(hook, others)(request=request)
        return found[0] if found else None


@dataclass(frozen=True)
class BackendHandle:
    """One backend: its spec, and its hooks without the name argument."""

    plugins: Plugins
    spec: BackendSpec

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.spec.name

    def open_device(self, request: DeviceRequest) -> Device:
        """See Plugins."""
        return self.plugins.open_device(self.name, request)

    def memory_allocator(self, request: AllocatorRequest) -> MemoryAllocator:
        """See Plugins."""
        return self.plugins.memory_allocator(self.name, request)

    def ops(self, request: OpsRequest) -> Ops:
        """See Plugins."""
        return self.plugins.ops(self.name, request)

    def compile(self, request: CompileRequest) -> Program:
        """See Plugins."""
        return self.plugins.compile(self.name, request)

    def communicator(self, request: CommunicatorRequest) -> Communicator:
        """See Plugins."""
        return self.plugins.communicator(self.name, request)

    def sampler(self, request: SamplerRequest) -> Sampler | None:
        """See Plugins."""
        return self.plugins.sampler(self.name, request)


class _Tracer:
    """Prints each hook call, its plugin and its time."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self.callbacks: tuple[Callable[..., None], Callable[..., None]] = (self._before, self._after)

    def _before(self, hook: str, impls: Sequence[pluggy.HookImpl], _: object) -> None:
        self._starts.append(time.perf_counter())

    def _after(self, _: object, hook: str, impls: Sequence[pluggy.HookImpl], kwargs: object) -> None:
        spent = time.perf_counter() - self._starts.pop()
        names = ", ".join(i.plugin_name for i in impls)
        sys.stderr.write(f"core: {hook} of {names} took {spent * 1e3:.2f} ms\n")
