"""Its probe promises the hardware, and its open device is a stand-in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whole import Whole

from backends.cpu_reference.device import ReferenceDevice
from core.contract.hookspecs import hookimpl
from core.contract.types import DeviceInfo


class StandIn(ReferenceDevice):
    """Says what it is."""

    @property
    def info(self) -> DeviceInfo:
        return replace(super().info, name="stand-in", execution="emulated")


class TwoFaced(Whole):
    """See above."""

    @hookimpl
    def core_open_device(self, request: Any) -> Any:
        return StandIn(request)


backend = TwoFaced("two_faced")
