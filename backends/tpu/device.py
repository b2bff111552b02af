"""One jax device: memory figures, host buffers, ordering, and how jax's errors become the contract's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from backends.tpu.plugin import SPEC
from core.contract.batch import Int32
from core.contract.errors import ConfigError, DeviceError, OutOfMemoryError
from core.contract.requests import DeviceRequest
from core.contract.types import DeviceInfo, MemoryInfo


@contextmanager
def device_errors(what: str, wanted_bytes: int = 0) -> Iterator[None]:
    """Turn a failure of jax's runtime into OutOfMemoryError or DeviceError that names `what`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemoryError(what, wanted_bytes, None) from error
        raise DeviceError(f"{what} failed on the device: {error}") from error


_HOST_BYTES = 8 * 2**30
"""Memory of the host that is offered as a device's. jax fills an array when it makes it, so a cache in all of
the host's would cost a minute at every start."""


def _host_memory() -> MemoryInfo:
    """A part of the machine's memory, which is the device's on jax's CPU platform."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise DeviceError(
            "the host's memory cannot be read from /proc/meminfo; give a memory budget in bytes"
        ) from error
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, free = (min(sizes[name], _HOST_BYTES) for name in ("MemTotal", "MemAvailable"))
    return MemoryInfo(total_bytes=total, free_bytes=free, kind="declared")


class TpuDevice:
    """An open jax device."""

    def __init__(self, handle: jax.Device, index: int) -> None:
        self._handle = handle
        self._closed = False
        info = DeviceInfo(
            backend=SPEC.name,
            index=index,
            name=f"{handle.device_kind} (jax {handle.platform} platform)",
            driver=f"jax {jax.__version__}",
            execution="native" if handle.platform == "tpu" else "emulated",
        )
        memory = self.memory()
        self._info = replace(info, memory_bytes=memory.total_bytes, memory_kind=memory.kind)

    @property
    def info(self) -> DeviceInfo:
        """Name, platform and measured memory."""
        return self._info

    @property
    def handle(self) -> jax.Device:
        """The jax device. Raises DeviceError after `close`."""
        if self._closed:
            raise DeviceError(f"device {self._info.name!r} was closed; open it again with core_open_device")
        return self._handle

    def memory(self) -> MemoryInfo:
        """The runtime's figures where it keeps them, else the host's."""
        stats = self.handle.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return _host_memory()
        limit = int(stats["bytes_limit"])
        return MemoryInfo(total_bytes=limit, free_bytes=limit - int(stats["bytes_in_use"]), kind="measured")

    def host_buffer(self, size: int) -> Int32:
        """Zeros, int32 [size]; jax has no pinned host memory to offer here."""
        _ = self.handle
        return np.zeros(size, np.int32)

    def put(self, array: npt.NDArray[Any]) -> jax.Array:
        """Copy a host array to the device.

        The copy on the host comes first because jax may alias a NumPy array's memory on the CPU platform, and
        may read it later elsewhere, while the caller goes on to change it.
        """
        placed: jax.Array = jax.device_put(np.array(array, order="C"), self.handle)
        return placed

    def synchronize(self) -> None:
        """Wait for every array of the process that is still alive; jax has no queue to wait for."""
        platform = self.handle.platform
        with device_errors("waiting for the device"):
            for array in jax.live_arrays(platform):  # type: ignore[no-untyped-call]
                if not array.is_deleted():
                    array.block_until_ready()

    def close(self) -> None:
        """Mark the device as closed; jax keeps its client for the life of the process."""
        self._closed = True


def open_device(request: DeviceRequest) -> TpuDevice:
    """Open device `request.index` of the chosen jax platform.

    Raises:
        DeviceError: the platform or index does not exist, or more than one rank is asked for.
        ConfigError: another option.
    """
    if request.world_size != 1:
        raise DeviceError(
            f"backend 'tpu' was opened with world_size {request.world_size}, but it serves 1 device; use tp=1"
        )
    if unknown := sorted(set(request.options) - {"platform"}):
        raise ConfigError(f"backend 'tpu' has no option {unknown[0]!r}; it has platform (cpu, gpu, tpu)")
    platform = request.options.get("platform")
    try:
        handles = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise DeviceError(
            f"jax has no devices on platform {platform or 'default'!r}: {error}; "
            "pass the backend option platform=cpu to run on the host"
        ) from error
    if not 0 <= request.index < len(handles):
        raise DeviceError(
            f"device index {request.index} was asked for, but jax shows {len(handles)} device(s); "
            f"use an index from 0 to {len(handles) - 1}"
        )
    return TpuDevice(handles[request.index], request.index)
