"""The backend under test: its hooks, and one open device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from core.contract.errors import ConfigError, PluginError
from core.contract.interfaces import Device
from core.contract.requests import (
    ConformanceExtras,
    ConformanceRequest,
    DeviceRequest,
    Floor,
    ProbeRequest,
)
from core.contract.spec import BackendSpec
from core.contract.types import DeviceInfo, Unavailable
from core.plugins import BackendHandle, Plugins, object_at

if TYPE_CHECKING:
    from conformance.constraints.watch import Watch


@dataclass(frozen=True)
class Target:
    """What the user asked to be tested; small enough to be sent to a worker.

    Attributes:
        backend: a backend's name, or "module:object" of a plugin that is not installed.
        dtype: compute dtype. index: of the device. options: backend options.
        fault: name of a planted fault and its severity, "" = none (`conformance.zoo`).
        constraints: name of a profile of rules that the backend runs under, "" = its own
            (`conformance.constraints`).
    """

    backend: str
    dtype: str = "float32"
    index: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    constraints: str = ""


class BackendMissing(PluginError):
    """There is no such backend here, or it has no device."""


class BackendRefused(PluginError):
    """The backend is here, but core does not load it; says why."""


class Subject:
    """A backend and its device, opened when it is first needed.

    Attributes:
        watch: what sees its steps, where it runs under constraints.
    """

    def __init__(self, target: Target, handle: BackendHandle, watch: Watch | None = None) -> None:
        self.target = target
        self.handle = handle
        self.watch = watch

    @property
    def plugin(self) -> Any:
        """The object that has the hooks."""
        return self.handle.plugins.plugin(self.handle.name)

    @property
    def place(self) -> str:
        """Where the plugin is: "module:object"."""
        plugin = self.plugin
        if isinstance(plugin, ModuleType):
            return f"{plugin.__name__}:"
        if ":" in self.target.backend:
            return self.target.backend
        return self.handle.plugins.place(self.handle.name)

    @classmethod
    def of(cls, target: Target) -> Subject:
        """Load the backend.

        Raises:
            BackendMissing, BackendRefused: as these say. ConfigError: there are no such constraints.
        """
        subject = cls._load(target)
        if not target.constraints:
            return subject
        from conformance.constraints.wrap import constrained

        return cls(target, *constrained(subject.handle, target.constraints))

    @classmethod
    def declared(cls, target: Target) -> Subject:
        """As `of`, with a dtype that the backend declares: "auto" becomes float32, or its first where it has
        not that.

        Raises:
            BackendMissing, BackendRefused: as these say. ConfigError: it declares no such dtype, or there are
            no such constraints.
        """
        subject = cls.of(target)
        dtypes = subject.spec.dtypes
        if target.dtype == "auto":
            dtype = "float32" if "float32" in dtypes else dtypes[0]
            return cls(replace(target, dtype=dtype), subject.handle, subject.watch)
        if target.dtype not in dtypes:
            raise ConfigError(
                f"dtype is {target.dtype!r}, but backend {target.backend!r} declares {', '.join(dtypes)}; "
                "give one of them as --dtype"
            )
        return subject

    @classmethod
    def _load(cls, target: Target) -> Subject:
        plugins = Plugins(disabled=frozenset())
        name = target.backend
        if target.fault:
            from conformance.zoo.plant import place_of, planted

            clone = planted(target.fault)
            own = _own_name(clone) or name
            return cls(target, plugins.register_backend(clone, own, place_of(target.fault)))
        if ":" not in name:
            plugins.load()
            try:
                return cls(target, plugins.backend(name))
            except PluginError as error:
                is_here = any(failure.name == name for failure in plugins.failures)
                raise (BackendRefused if is_here else BackendMissing)(str(error)) from error
        plugin = _import(name)
        try:
            own = _own_name(plugin) or name.partition(":")[0].rpartition(".")[2]
            return cls(target, plugins.register_backend(plugin, own, name))
        except PluginError as error:
            raise BackendRefused(str(error)) from error

    @property
    def spec(self) -> BackendSpec:
        """What the backend declares."""
        return self.handle.spec

    @cached_property
    def info(self) -> DeviceInfo:
        """The device under test, as the probe gives it.

        Raises:
            BackendMissing: there is no such device.
        """
        found = self.handle.probe(ProbeRequest())
        if isinstance(found, Unavailable):
            raise BackendMissing(f"backend {self.spec.name!r} has no device: {found.reason}")
        if self.target.index >= len(found):
            raise BackendMissing(
                f"backend {self.spec.name!r} has {len(found)} devices, none of index {self.target.index}"
            )
        return found[self.target.index]

    @cached_property
    def extras(self) -> ConformanceExtras:
        """What the vendor brings to the suite."""
        return self.handle.conformance(ConformanceRequest(version=self.spec.contract))

    @property
    def floors(self) -> tuple[Floor, ...]:
        """Speeds that the device under test is held to, in the dtype under test; () without a device."""
        try:
            name = self.info.name
        except BackendMissing:
            return ()
        return tuple(
            floor
            for floor in self.extras.floors
            if floor.dtype == self.target.dtype and fnmatchcase(name, floor.device)
        )

    @cached_property
    def device(self) -> Device:
        """The open device; one for all tests of a worker."""
        return self.handle.open_device(DeviceRequest(index=self.target.index, options=self.target.options))

    def open(self) -> Device:
        """The device opened once more, for a test that closes it."""
        return self.handle.open_device(DeviceRequest(index=self.target.index, options=self.target.options))


def _import(place: str) -> object:
    module = place.partition(":")[0]
    try:
        return object_at(place)
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        raise (BackendMissing if is_missing else BackendRefused)(
            f"{place!r} cannot be imported ({type(error).__name__}: {error}); give MODULE:OBJECT, or MODULE: "
            "where the module itself has the hooks"
        ) from error


def _own_name(plugin: Any) -> str:
    from core.contract import CONTRACT
    from core.contract.requests import SpecRequest

    try:
        return str(plugin.core_backend_spec(SpecRequest(contract=CONTRACT)).name)
    except Exception:
        # `register_backend` tells what is wrong with it.
        return ""
