"""The host as a device: memory figures and host buffers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from core.contract.batch import Int32
from core.contract.errors import ConfigError, DeviceError
from core.contract.requests import DeviceRequest
from core.contract.types import DeviceInfo, MemoryInfo


def host_memory() -> MemoryInfo:
    """The host's memory in bytes: measured where /proc tells it, within the limit of the control group (v2).

    Elsewhere only the total is known, and half of it is declared free.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return MemoryInfo(total_bytes=total, free_bytes=total // 2, kind="declared")
    kibibytes = {}
    for line in meminfo.read_text().splitlines():
        name, value = line.split(":")
        kibibytes[name] = int(value.split()[0])
    total, free = kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        most = int(limit.read_text())
        total, free = min(total, most), max(0, min(free, most - int(used.read_text())))
    return MemoryInfo(total_bytes=total, free_bytes=free, kind="measured")


def describe(driver: str) -> DeviceInfo:
    """The one device."""
    memory = host_memory()
    return DeviceInfo(
        backend="cpu_reference",
        index=0,
        name=f"{platform.machine()} host",
        memory_bytes=memory.total_bytes,
        memory_kind=memory.kind,
        driver=driver,
        execution="native",
    )


class ReferenceDevice:
    """See `core.contract.interfaces.Device`. Every call is finished when it returns.

    Raises:
        DeviceError: another index than 0. ConfigError: an option, or a number of threads, which NumPy takes
            from the environment only.
    """

    def __init__(self, request: DeviceRequest) -> None:
        if request.index != 0:
            raise DeviceError(f"backend 'cpu_reference' has no device {request.index}; its only index is 0")
        if request.options:
            raise ConfigError(
                f"backend 'cpu_reference' has no option {', '.join(sorted(request.options))}; "
                "take them out of backend_options"
            )
        if request.num_threads is not None:
            raise ConfigError(
                f"num_threads is {request.num_threads}, but NumPy takes its number of threads from the "
                "environment; leave num_threads out and set OMP_NUM_THREADS before starting"
            )
        self._info = describe(f"numpy {np.__version__}")
        self._open = True

    @property
    def info(self) -> DeviceInfo:
        """See the protocol."""
        return self._info

    def memory(self) -> MemoryInfo:
        """See the protocol."""
        self.check_open()
        return host_memory()

    def host_buffer(self, size: int) -> Int32:
        """See the protocol. Steps read it in place."""
        self.check_open()
        return np.zeros(size, np.int32)

    def synchronize(self) -> None:
        """Returns at once."""
        self.check_open()

    def close(self) -> None:
        """See the protocol."""
        self._open = False

    def check_open(self) -> None:
        """Raises DeviceError after `close`."""
        if not self._open:
            raise DeviceError(
                "the device of backend 'cpu_reference' is closed; open it again before using it"
            )
