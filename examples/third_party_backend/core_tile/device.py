"""Devices of backend `tile`: the host stands in for the chip."""

from __future__ import annotations

import os

import numpy as np

from core.contract.batch import Int32
from core.contract.errors import ConfigError, DeviceError
from core.contract.requests import DeviceRequest
from core.contract.types import DeviceInfo, MemoryInfo


def find_devices() -> list[DeviceInfo]:
    """Every device of this machine."""
    driver = f"numpy {np.__version__}"
    return [
        DeviceInfo(
            backend="tile",
            index=0,
            name="tile on the host",
            memory_bytes=host_bytes(),
            driver=driver,
            execution="emulated",
        )
    ]


def host_bytes() -> int:
    """Memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class HostDevice:
    """See `core.contract.interfaces.Device`."""

    def __init__(self, request: DeviceRequest) -> None:
        if request.options:
            raise ConfigError(f"backend 'tile' has no option {min(request.options)!r}; leave it out")
        found = {info.index: info for info in find_devices()}
        if request.index not in found:
            raise DeviceError(f"backend 'tile' has no device {request.index}; it has {sorted(found)}")
        self.info = found[request.index]
        self._is_open = True

    def memory(self) -> MemoryInfo:
        """Memory now."""
        self.check_open()
        total = host_bytes()
        return MemoryInfo(total_bytes=total, free_bytes=total // 2, kind="declared")

    def host_buffer(self, size: int) -> Int32:
        """A zeroed host array; pin it where that is faster."""
        self.check_open()
        return np.zeros(size, np.int32)

    def synchronize(self) -> None:
        """Wait for everything submitted."""
        self.check_open()

    def close(self) -> None:
        """Give everything back."""
        self._is_open = False

    def check_open(self) -> None:
        """Raises DeviceError after `close`."""
        if not self._is_open:
            raise DeviceError("the device of backend 'tile' is closed; open it again")
