"""The host as a device: memory figures, threads, host buffers. Importing this module imports no torch."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.contract.batch import Int32
from core.contract.errors import ConfigError, DeviceError
from core.contract.requests import DeviceRequest
from core.contract.types import DeviceInfo, MemoryInfo


def memory_info() -> MemoryInfo:
    """Memory of this machine, or of the control group (v2) that the process is confined to, in bytes.

    Where the system tells only its total (no /proc/meminfo), half of it is declared free.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return MemoryInfo(total_bytes=total, free_bytes=total // 2, kind="declared")
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    limit, used = _group_figure("memory.max"), _group_figure("memory.current")
    if limit is not None and used is not None:
        total, free = min(total, limit), min(free, max(0, limit - used))
    return MemoryInfo(total_bytes=total, free_bytes=free, kind="measured")


def _group_figure(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def describe(index: int, driver: str) -> DeviceInfo:
    """The DeviceInfo of this host. Every index means the same host, so that several ranks can share it."""
    memory = memory_info()
    return DeviceInfo(
        backend="cpu",
        index=index,
        name=f"{platform.machine()} CPU, {_num_cores()} cores",
        memory_bytes=memory.total_bytes,
        memory_kind=memory.kind,
        driver=driver,
        execution="native",
    )


def _num_cores() -> int:
    """Cores that this process may use: its affinity, and the quota (v2) of its control group, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, -(-int(quota) // int(period)))) if quota.isdigit() else cores


class CpuDevice:
    """One process's share of the host.

    torch's thread count belongs to the process, and the device opened last sets it: to what it was asked for,
    else to torch's own choice, within the cores that the process may use, divided among the host's ranks.

    Raises:
        DeviceError: torch can't be imported. ConfigError: an option that this backend does not know.
    """

    def __init__(self, request: DeviceRequest) -> None:
        if request.options:
            raise ConfigError(
                f"backend 'cpu' has no option {', '.join(sorted(request.options))}; take them out of "
                "backend_options"
            )
        if request.index < 0:
            raise DeviceError(f"backend 'cpu' has no device {request.index}; indices start at 0")
        try:
            import torch
        except ImportError as error:
            raise DeviceError(f"torch can't be imported ({error}); pip install core[cpu]") from error
        threads = request.num_threads
        if threads is None:
            threads = max(1, min(torch.get_num_threads(), _num_cores()) // request.world_size)
        torch.set_num_threads(threads)
        self._num_sharing = request.world_size
        self._info = describe(request.index, f"torch {torch.__version__}")
        self._open = True

    @property
    def info(self) -> DeviceInfo:
        """See `core.contract.interfaces.Device`."""
        return self._info

    def memory(self) -> MemoryInfo:
        """See `core.contract.interfaces.Device`."""
        self.check_open()
        found = memory_info()
        # Ranks share the host, and each may count on its part of what is free only.
        return replace(found, free_bytes=found.free_bytes // self._num_sharing)

    def host_buffer(self, size: int) -> Int32:
        """See `core.contract.interfaces.Device`. Steps read it in place: nothing is copied."""
        self.check_open()
        return np.zeros(size, np.int32)

    def synchronize(self) -> None:
        """Returns at once: every call is finished when it returns."""
        self.check_open()

    def close(self) -> None:
        """See `core.contract.interfaces.Device`."""
        self._open = False

    def check_open(self) -> None:
        """Raises DeviceError after `close`."""
        if not self._open:
            raise DeviceError(
                f"device {self._info.index} of backend 'cpu' is closed; open it again before using it"
            )
