"""A backend that is right, made of the reference's hooks: what the others here change in one place.

Each file of this folder is a module of its own, as a vendor's would be, so the lint of imports sees it alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backends.cpu_reference import plugin as reference
from core.contract.hookspecs import hookimpl
from core.contract.spec import BackendSpec


class Whole:
    """The reference's hooks under another name."""

    def __init__(self, name: str, **changes: Any) -> None:
        self.spec = replace(reference.SPEC, name=name, **changes)

    @hookimpl
    def core_backend_spec(self, request: Any) -> BackendSpec:
        return self.spec

    @hookimpl
    def core_probe(self, request: Any) -> Any:
        found = reference.core_probe(request)
        return [replace(i, backend=self.spec.name) for i in found] if isinstance(found, list) else found

    @hookimpl
    def core_open_device(self, request: Any) -> Any:
        return reference.core_open_device(request)

    @hookimpl
    def core_memory_allocator(self, request: Any) -> Any:
        return reference.core_memory_allocator(request)

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        return reference.core_ops(request)

    @hookimpl
    def core_compile(self, request: Any) -> Any:
        return reference.core_compile(request)


backend = Whole("whole")
