"""Discovery, version gate, selection and tracing of plugins; one typed method per hook.

Plugins are entry points of two groups: `core.backends`, and `core.plugins` for everything else. Loading
imports each of them once; one that can't be used becomes a `LoadFailure` and disturbs no other. A backend is
chosen by name before any of its factory hooks is called, and hooks are called on that plugin alone, so the
order of registration decides nothing. There is no current backend: several serve one process side by side.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import pluggy

from core import env
from core.contract import CONTRACT, OLDEST_MINOR, hookspecs
from core.contract.errors import ContractVersionError, PluginError
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

Group = Literal["core.backends", "core.plugins"]
BACKENDS: Group = "core.backends"
ADDONS: Group = "core.plugins"
HOOKS = hookspecs.REQUIRED_HOOKS + hookspecs.OPTIONAL_HOOKS

log = logging.getLogger("core.plugins")


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that can't be used: its entry point's name, why (one sentence), and the root cause."""

    name: str
    reason: str
    error: BaseException = field(repr=False, compare=False)


@dataclass(frozen=True)
class Selection:
    """The chosen backend, the devices that its probe gave (at least one), and why it was chosen."""

    spec: BackendSpec
    devices: tuple[DeviceInfo, ...]
    reason: str


class Plugins:
    """All plugins of a process.

    Args:
        contract, oldest_minor: the window of contract versions that load.
        disabled: names that are not loaded; None = what the environment says.
        trace: log each hook call with its duration to stderr; None = at debug level 2 and above.
    """

    def __init__(
        self,
        *,
        contract: tuple[int, int] = CONTRACT,
        oldest_minor: int = OLDEST_MINOR,
        disabled: frozenset[str] | None = None,
        trace: bool | None = None,
    ) -> None:
        self._contract = contract
        self._oldest_minor = oldest_minor
        self._disabled = env.disabled_plugins() if disabled is None else disabled
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs.BackendHooks)
        self._manager.add_hookspecs(hookspecs.OptionalHooks)
        self._specs: dict[str, BackendSpec] = {}
        self._addons: set[str] = set()
        self._failures: dict[str, LoadFailure] = {}
        self._places: dict[str, str] = {}
        self._registered: dict[str, str] = {}
        self._loaded = False
        self._trace = env.debug_level() >= 2 if trace is None else trace
        if self._trace:
            _log_to_stderr()

    def load(self) -> None:
        """Import and register every entry point that is not disabled. A second call does nothing.

        Raises nothing for a plugin that can't be used: `failures` lists it, and asking for it by name raises.
        """
        if self._loaded:
            return
        self._loaded = True
        found: dict[str, list[tuple[Group, EntryPoint]]] = {}
        for group in (BACKENDS, ADDONS):
            for point in entry_points(group=group):
                found.setdefault(point.name, []).append((group, point))
        for name in sorted(found.keys() - self._disabled):
            try:
                group, point = _only(name, found[name])
                self._places[name] = point.value if ":" in point.value else f"{point.value}:"
                self._admit(_import(name, point), name, group)
            except PluginError as error:
                self._failures[name] = LoadFailure(name, str(error), error)
            except (Exception, SystemExit) as error:
                reason = f"plugin {name!r} cannot be loaded: {_text(error)}; repair or uninstall it"
                self._failures[name] = LoadFailure(name, reason, error)
        self._manager.check_pending()

    def register_backend(self, plugin: object, name: str, place: str = "") -> BackendHandle:
        """Add a backend that is not installed: a module or object with hook implementations.

        Args:
            place: "module:object" from which other processes can import it; without it, it runs in this
                process alone.

        Raises:
            PluginError: it can't be used, or the name is taken. ContractVersionError: it was built for a
                contract outside the window.
        """
        self._admit(plugin, name, BACKENDS)
        self._manager.check_pending()
        self._registered[name] = place
        return self.backend(name)

    def register_place(self, place: str, name: str) -> BackendHandle:
        """Import "module:object" and add it as a backend. Raises as the import and `register_backend` do."""
        return self.register_backend(object_at(place), name, place)

    def register_addon(self, plugin: object, name: str) -> None:
        """Add an add-on that is not installed. Raises as `register_backend`."""
        self._admit(plugin, name, ADDONS)
        self._manager.check_pending()

    @property
    def failures(self) -> tuple[LoadFailure, ...]:
        """Plugins that can't be used, by name."""
        return tuple(self._failures[name] for name in sorted(self._failures))

    @property
    def addons(self) -> tuple[str, ...]:
        """Names of the add-ons in use, ascending."""
        return tuple(sorted(self._addons))

    def specs(self) -> tuple[BackendSpec, ...]:
        """What every usable backend declares, by name."""
        return tuple(self._specs[name] for name in sorted(self._specs))

    def spec(self, name: str) -> BackendSpec:
        """What one backend declares.

        Raises:
            PluginError: it is unknown or disabled, or it failed to load; the root cause is `__cause__`.
        """
        if name in self._specs:
            return self._specs[name]
        if name in self._failures:
            failure = self._failures[name]
            raise PluginError(f"backend {name!r} can't be used: {failure.reason}") from _root(failure.error)
        if name in self._disabled:
            raise PluginError(
                f"backend {name!r} is disabled by {env.DISABLE.name}; take it out of that list to use it"
            )
        known = ", ".join(sorted(self._specs)) or "none"
        raise PluginError(
            f"no backend is named {name!r}; installed: {known}{_nearest(name, self._specs)}; choose one of "
            "them or install the distribution that brings it"
        )

    def plugin(self, name: str) -> object:
        """The object that has a backend's hooks. Raises as `spec`."""
        self.spec(name)
        found: object = self._manager.get_plugin(name)
        return found

    def place(self, name: str) -> str:
        """Where a backend is: "module:object", "" if nobody said. Raises as `spec`."""
        self.spec(name)
        return self._places.get(name) or self._registered.get(name, "")

    def registered_place(self, name: str) -> str | None:
        """Where other processes find a backend that was registered, or ""; None for an installed one."""
        return self._registered.get(name)

    def backend(self, name: str) -> BackendHandle:
        """A handle whose methods call this backend's hooks. Raises as `spec`."""
        return BackendHandle(self, name, self.spec(name))

    def select(self, name: str = "auto", request: ProbeRequest | None = None) -> Selection:
        """The backend to use: by name, or with "auto" the highest `auto_rank` whose probe gives devices.

        Raises:
            PluginError: the named backend can't be used or has no device; with "auto", none has a device, or
                two of the same rank have.
        """
        request = request or ProbeRequest()
        if name == "auto":
            return self._select_auto(request)
        spec, found = self.spec(name), self.probe(name, request)
        if isinstance(found, Unavailable):
            raise PluginError(f"backend {name!r} has no device: {_why(found)}")
        return Selection(spec, found, "asked for by name")

    def probe(self, name: str, request: ProbeRequest | None = None) -> tuple[DeviceInfo, ...] | Unavailable:
        """Devices of one backend, at least one, or why there are none.

        Raises:
            PluginError: the probe raised, or gave something else.
        """
        try:
            found = self._one(name, "core_probe", request or ProbeRequest())
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"core_probe of backend {name!r} raised {_text(error)}; it should have returned Unavailable "
                "with a reason: report it to the plugin's authors"
            ) from error
        if isinstance(found, Unavailable):
            return found
        if not isinstance(found, (list, tuple)) or not found:
            raise PluginError(
                f"core_probe of backend {name!r} returned {found!r} in place of devices or Unavailable; "
                "report it to the plugin's authors"
            )
        return tuple(found)

    def open_device(self, name: str, request: DeviceRequest) -> Device:
        """See `core_open_device`."""
        device: Device = self._one(name, "core_open_device", request)
        return device

    def memory_allocator(self, name: str, request: AllocatorRequest) -> MemoryAllocator:
        """See `core_memory_allocator`."""
        allocator: MemoryAllocator = self._one(name, "core_memory_allocator", request)
        return allocator

    def ops(self, name: str, request: OpsRequest) -> Ops:
        """See `core_ops`."""
        table: Ops = self._one(name, "core_ops", request)
        return table

    def compile(self, name: str, request: CompileRequest) -> Program:
        """See `core_compile`."""
        program: Program = self._one(name, "core_compile", request)
        return program

    def communicator(self, name: str, request: CommunicatorRequest) -> Communicator:
        """See `core_communicator`.

        Raises:
            PluginError: the backend has no such hook.
        """
        communicator: Communicator = self._one(name, "core_communicator", request)
        return communicator

    def sampler(self, name: str, request: SamplerRequest) -> Sampler | None:
        """See `core_sampler`; None where the backend has no such hook."""
        sampler: Sampler | None = self._maybe(name, "core_sampler", request)
        return sampler

    def attention_kernels(
        self, name: str, request: AttentionKernelRequest
    ) -> tuple[tuple[str, AttentionKernel], ...]:
        """Offers for a cache layer on one backend: (plugin, kernel), the backend's own first, then the
        add-ons' by name. Which one runs is the caller's stored choice.
        """
        self.spec(name)
        offers = ((p, self._maybe(p, "core_attention_kernel", request)) for p in (name, *self.addons))
        return tuple((plugin, kernel) for plugin, kernel in offers if kernel is not None)

    def model_override(self, name: str, request: OverrideRequest) -> Any | None:
        """See `core_model_override`; None where the backend has none for this model."""
        return self._maybe(name, "core_model_override", request)

    def conformance(self, name: str, request: ConformanceRequest) -> ConformanceExtras:
        """See `core_conformance`; nothing extra where the backend has no such hook."""
        extras: ConformanceExtras | None = self._maybe(name, "core_conformance", request)
        return extras or ConformanceExtras()

    def cli(self, app: Any) -> None:
        """Let every plugin add commands to `app`. One that raises is logged and becomes a `LoadFailure`."""
        for name in (*sorted(self._specs), *self.addons):
            try:
                self._maybe(name, "core_cli", CliRequest(app=app))
            except Exception as error:
                reason = f"core_cli of plugin {name!r} raised {_text(error)}; its commands are missing"
                self._failures.setdefault(name, LoadFailure(name, reason, error))
                log.warning("%s", reason)

    def observers(self, request: ObserverRequest) -> tuple[Observer, ...]:
        """Callbacks of every plugin, by the plugin's name."""
        out: list[Observer] = []
        for name in sorted((*self._specs, *self._addons)):
            given: Sequence[Observer] | None = self._maybe(name, "core_observer", request)
            out += given or ()
        return tuple(out)

    def _select_auto(self, request: ProbeRequest) -> Selection:
        ranked = sorted((s for s in self.specs() if s.auto_rank is not None), key=lambda s: -_rank(s))
        skipped: list[str] = []
        best: list[tuple[BackendSpec, tuple[DeviceInfo, ...]]] = []
        for spec in ranked:
            if best and _rank(spec) < _rank(best[0][0]):
                break
            try:
                found = self.probe(spec.name, request)
            except PluginError as error:
                found = Unavailable(str(error))
            if isinstance(found, Unavailable):
                skipped.append(f"{spec.name}: {_why(found)}")
            else:
                best.append((spec, found))
        if not best:
            skipped += [f"{f.name}: {f.reason}" for f in self.failures]
            by_name = [s.name for s in self.specs() if s.auto_rank is None]
            also = f"; only by name: {', '.join(by_name)}" if by_name else ""
            tried = "; ".join(skipped) or "none is installed"
            raise PluginError(f"no backend has a device ({tried}{also}); name one, or install one that has")
        if len(best) > 1:
            names = ", ".join(spec.name for spec, _ in best)
            raise PluginError(
                f"backends {names} have devices and the same rank {best[0][0].auto_rank}; name the one to use"
            )
        spec, devices = best[0]
        reasons = [f"auto: rank {spec.auto_rank} is the highest with a device"]
        reasons += [f"passed over {why}" for why in skipped]
        if self.failures:
            reasons.append(f"not loaded: {', '.join(f.name for f in self.failures)} (core doctor says why)")
        return Selection(spec, devices, "; ".join(reasons))

    def _admit(self, plugin: object, name: str, group: Group) -> None:
        """Register and check one plugin; leaves nothing behind where it can't be used.

        The version is looked at before anything else: what a plugin of another contract lacks or has too
        much follows from it.
        """
        if name in self._specs or name in self._addons:
            raise PluginError(f"a plugin named {name!r} is registered already; give this one another name")
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            self._forget(plugin)
            raise PluginError(f"plugin {name!r} does not fit the hook specifications: {error}") from error
        try:
            spec = self._read_spec(plugin, name) if group == BACKENDS else None
            self._check_version(name, spec.contract if spec else getattr(plugin, "CONTRACT", None))
            self._check_hooks(plugin, name)
            if spec:
                self._check_backend(plugin, spec)
        except PluginError:
            self._forget(plugin)
            raise
        if spec:
            self._specs[name] = spec
        else:
            self._addons.add(name)

    def _forget(self, plugin: object) -> None:
        if self._manager.is_registered(plugin):
            self._manager.unregister(plugin)

    def _read_spec(self, plugin: object, name: str) -> BackendSpec:
        self._require(plugin, name, "core_backend_spec")
        try:
            spec = self._call(name, "core_backend_spec", SpecRequest(contract=self._contract))
        except Exception as error:
            raise PluginError(f"core_backend_spec of plugin {name!r} raised {_text(error)}") from error
        if not isinstance(spec, BackendSpec):
            raise PluginError(f"core_backend_spec of plugin {name!r} returned {spec!r}, not a BackendSpec")
        return spec

    def _check_version(self, name: str, built_for: tuple[int, int] | None) -> None:
        major, minor = self._contract
        ours = f"this core loads ({major}, {self._oldest_minor}) to ({major}, {minor})"
        if built_for is None:
            raise ContractVersionError(
                f"plugin {name!r} states no contract version and {ours}; give it an attribute "
                f"CONTRACT = ({major}, {minor})"
            )
        if (
            not isinstance(built_for, tuple | list)
            or len(built_for) != 2
            or not all(type(n) is int for n in built_for)
        ):
            raise PluginError(
                f"plugin {name!r} says that it was built for contract {built_for!r}; it must be two whole "
                f"numbers, such as ({major}, {minor})"
            )
        theirs = f"plugin {name!r} was built for contract {tuple(built_for)!r}"
        if tuple(built_for) > self._contract:
            raise ContractVersionError(
                f"{theirs} but {ours}; upgrade core, or install an older version of the plugin"
            )
        if tuple(built_for) < (major, self._oldest_minor):
            raise ContractVersionError(
                f"{theirs} but {ours}; install a newer version of the plugin, or an older core"
            )

    def _check_hooks(self, plugin: object, name: str) -> None:
        """Every hook has a known name, takes exactly `request`, and is marked."""
        marked = set()
        for caller in self._manager.get_hookcallers(plugin) or ():
            impl = next(i for i in caller.get_hookimpls() if i.plugin is plugin)
            marked.add(caller.name)
            if not caller.has_spec():
                raise PluginError(
                    f"plugin {name!r} implements {caller.name!r}, which is no hook"
                    f"{_nearest(caller.name, HOOKS)}; correct the name or remove it"
                )
            if tuple(impl.argnames) != ("request",):
                raise PluginError(
                    f"{caller.name} of plugin {name!r} takes ({', '.join(impl.argnames)}); "
                    "it must take exactly (request)"
                )
        for hook in HOOKS:
            if hook not in marked and callable(getattr(plugin, hook, None)):
                raise PluginError(f"{hook} of plugin {name!r} is not marked; put @hookimpl on it")

    def _check_backend(self, plugin: object, spec: BackendSpec) -> None:
        name = self._manager.get_name(plugin) or ""
        if spec.name != name:
            raise PluginError(
                f"backend {name!r} calls itself {spec.name!r}; give BackendSpec and entry point one name"
            )
        if name != name.lower() or name == "auto":
            raise PluginError(f"{name!r} can't be a backend's name; use lower case, and not 'auto'")
        for hook in hookspecs.REQUIRED_HOOKS:
            self._require(plugin, name, hook)
        if spec.device_sampler:
            self._require(plugin, name, "core_sampler", " although it declares device_sampler")
        if spec.max_world_size > 1:
            declared = f" although it declares max_world_size {spec.max_world_size}"
            self._require(plugin, name, "core_communicator", declared)

    def _require(self, plugin: object, name: str, hook: str, although: str = "") -> None:
        if not self._has(plugin, hook):
            self._check_hooks(plugin, name)  # a misspelled or unmarked hook explains more than a missing one
            raise PluginError(
                f"plugin {name!r} does not implement the hook {hook}{although}; "
                "implement it as docs/hooks.md says"
            )

    def _has(self, plugin: object, hook: str) -> bool:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return any(impl.plugin is plugin for impl in caller.get_hookimpls())

    def _one(self, name: str, hook: str, request: object) -> Any:
        """Call a hook of one backend that must answer."""
        self.spec(name)
        self._require(self._manager.get_plugin(name), name, hook)
        result = self._call(name, hook, request)
        if result is None:
            raise PluginError(f"{hook} of backend {name!r} returned None; report it to the plugin's authors")
        return result

    def _maybe(self, name: str, hook: str, request: object) -> Any | None:
        """Call a hook of one plugin that may be absent or answer None."""
        if name not in self._addons:
            self.spec(name)
        plugin = self._manager.get_plugin(name)
        return self._call(name, hook, request) if self._has(plugin, hook) else None

    def _call(self, name: str, hook: str, request: object) -> Any:
        chosen = self._manager.get_plugin(name)
        others = [p for p in self._manager.get_plugins() if p is not chosen]
        call: Callable[..., list[Any]] = self._manager.subset_hook_caller(hook, others)
        start = time.perf_counter()
        outcome = "raised"
        try:
            results = call(request=request)
            outcome = "returned"
        finally:
            if self._trace:
                taken = (time.perf_counter() - start) * 1e3
                log.debug("%s of %s %s after %.3f ms", hook, name, outcome, taken)
        return results[0] if results else None


def object_at(place: str) -> object:
    """What "module:object" names; "module:" is the module itself. Raises as the import does."""
    module, _, attribute = place.partition(":")
    found: object = import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class BackendHandle:
    """One backend's hooks, bound to its name; methods as in `Plugins`."""

    plugins: Plugins = field(repr=False)
    name: str
    spec: BackendSpec

    def probe(self, request: ProbeRequest | None = None) -> tuple[DeviceInfo, ...] | Unavailable:
        """See `Plugins.probe`."""
        return self.plugins.probe(self.name, request)

    def open_device(self, request: DeviceRequest) -> Device:
        """See `Plugins.open_device`."""
        return self.plugins.open_device(self.name, request)

    def memory_allocator(self, request: AllocatorRequest) -> MemoryAllocator:
        """See `Plugins.memory_allocator`."""
        return self.plugins.memory_allocator(self.name, request)

    def ops(self, request: OpsRequest) -> Ops:
        """See `Plugins.ops`."""
        return self.plugins.ops(self.name, request)

    def compile(self, request: CompileRequest) -> Program:
        """See `Plugins.compile`."""
        return self.plugins.compile(self.name, request)

    def communicator(self, request: CommunicatorRequest) -> Communicator:
        """See `Plugins.communicator`."""
        return self.plugins.communicator(self.name, request)

    def sampler(self, request: SamplerRequest) -> Sampler | None:
        """See `Plugins.sampler`."""
        return self.plugins.sampler(self.name, request)

    def attention_kernels(self, request: AttentionKernelRequest) -> tuple[tuple[str, AttentionKernel], ...]:
        """See `Plugins.attention_kernels`."""
        return self.plugins.attention_kernels(self.name, request)

    def model_override(self, request: OverrideRequest) -> Any | None:
        """See `Plugins.model_override`."""
        return self.plugins.model_override(self.name, request)

    def conformance(self, request: ConformanceRequest) -> ConformanceExtras:
        """See `Plugins.conformance`."""
        return self.plugins.conformance(self.name, request)


def _only(name: str, points: list[tuple[Group, EntryPoint]]) -> tuple[Group, EntryPoint]:
    if len(points) > 1:
        places = ", ".join(f"{_distribution(p)} ({group}: {p.value})" for group, p in points)
        raise PluginError(
            f"{len(points)} plugins are named {name!r}: {places}; uninstall all but one, or disable the name"
        )
    return points[0]


def _import(name: str, point: EntryPoint) -> object:
    try:
        plugin: object = point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {name!r} of {_distribution(point)} failed to import {point.value}: {_text(error)}; "
            f"repair or uninstall it, or disable it with {env.DISABLE.name}={name}"
        ) from error
    return plugin


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def _nearest(name: str, known: Sequence[str] | dict[str, BackendSpec]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", nearest is {matches[0]!r}" if matches else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _why(unavailable: Unavailable) -> str:
    return "; ".join(part for part in (unavailable.reason, unavailable.remedy) if part)


def _rank(spec: BackendSpec) -> int:
    return -1 if spec.auto_rank is None else spec.auto_rank


def _log_to_stderr() -> None:
    log.setLevel(logging.DEBUG)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
