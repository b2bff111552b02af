"""A backend with a planted fault."""

from __future__ import annotations

from types import ModuleType

from conformance.zoo.clone import edited, load, sources
from conformance.zoo.faults import FAULTS, LEGAL
from core.contract.errors import ConfigError


def planted(name: str) -> ModuleType:
    """The entry module of the reference backend's clone with a fault: "name:severity".

    Raises:
        ConfigError: there is no such fault.
    """
    fault_name, _, severity = name.partition(":")
    fault = next((f for f in (*FAULTS, *LEGAL) if f.name == fault_name), None)
    if fault is None:
        raise ConfigError(f"there is no fault {fault_name!r} in the zoo")
    edits = [(module, old, new.replace("{s}", severity)) for module, old, new in fault.edits]
    return load(edited(sources(), edits), "conformance_zoo_subject")
