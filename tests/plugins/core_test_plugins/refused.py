"""Backends for the version gate and for the check of hook names."""

from __future__ import annotations

from dataclasses import replace

from core.contract.hookspecs import hookimpl
from core.contract.interfaces import MemoryAllocator
from core.contract.requests import AllocatorRequest
from core_test_plugins.null import SPEC, NullBackend

OLDER_CONTRACT = NullBackend(replace(SPEC, name="older_contract", contract=(0, 1)))
"""Built for 0.1: loads wherever 0.1 is inside the window."""

NEWER_CONTRACT = NullBackend(replace(SPEC, name="newer_contract", contract=(0, 99)))
"""Built for a contract that no core has yet."""


class Misspelled(NullBackend):
    """Has every required hook, and one more whose name is wrong."""

    @hookimpl
    def core_memory_alocator(self, request: AllocatorRequest) -> MemoryAllocator:
        """No hook has this name."""
        raise AssertionError("never called")


MISSPELLED_HOOK = Misspelled(replace(SPEC, name="misspelled_hook"))
