"""A backend with a planted fault, which processes that know nothing but its place can import, too."""

from __future__ import annotations

from types import ModuleType

from conformance.zoo.clone import BASE, edited, load, sources
from conformance.zoo.faults import FAULTS, LEGAL
from core.contract.errors import ConfigError


def planted(name: str) -> ModuleType:
    """The entry module of a backend's clone with a fault: "name:severity".

    Raises:
        ConfigError: there is no such fault.
    """
    fault_name, _, severity = name.partition(":")
    fault = next((f for f in (*FAULTS, *LEGAL) if f.name == fault_name), None)
    if fault is None:
        raise ConfigError(f"there is no fault {fault_name!r} in the zoo")
    edits = [(module, old, new.replace("{s}", severity)) for module, old, new in fault.edits]
    if fault.base != BASE:  # beside the backend itself, in an engine's ranks
        edits.append(("plugin", f'name="{fault.base}",', f'name="{fault.base}_planted",'))
    return load(edited(sources(fault.base), edits), "conformance_zoo_subject", fault.base)


def place_of(name: str) -> str:
    """Where other processes find the clone; "" for a severity with a dot, which no place can have."""
    return "" if "." in name else f"{__name__}:{name}"


def __getattr__(name: str) -> ModuleType:
    if name.partition(":")[0] not in {fault.name for fault in FAULTS}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return planted(name)
