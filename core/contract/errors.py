"""Every error that crosses the waist or reaches a user.

A message names the thing, the value found, the value wanted, and the remedy, in one sentence: it is printed
as it is.
"""

from __future__ import annotations


class CoreError(Exception):
    """Root of the tree. `str(error)` is a sentence that a user can act on."""


class ConfigError(CoreError):
    """A wrong option, environment variable, path or model folder; raised before any work starts."""


class WeightError(CoreError):
    """A checkpoint that is not what its configuration says; names file, tensor, found and wanted."""


class PluginError(CoreError):
    """A plugin that cannot be used: failed import, wrong contract, missing hook, ambiguous choice."""


class ContractVersionError(PluginError):
    """A plugin was built for a contract version outside the window that this core loads."""


class UnsupportedError(CoreError):
    """A backend was asked for something that its `BackendSpec` does not declare; raised before memory is
    touched.
    """


class RequestError(CoreError):
    """One request is at fault (too long, bad parameter, deadline passed). Nothing else is affected."""


class QueueFullError(RequestError):
    """As many requests wait as are allowed. The same request may be taken later."""


class DeviceError(CoreError):
    """One worker or device failed."""


class OutOfMemoryError(DeviceError):
    """An allocation did not fit. Nothing was allocated.

    Args:
        what: what was to be allocated.
        wanted_bytes: its size.
        free_bytes: what the device had free, or None where it cannot be asked.
    """

    def __init__(self, what: str, wanted_bytes: int, free_bytes: int | None) -> None:
        self.what = what
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        free = "an unknown amount is" if free_bytes is None else f"{free_bytes / 2**20:.1f} MiB are"
        super().__init__(
            f"{what} needs {wanted_bytes / 2**20:.1f} MiB but {free} free; "
            "free memory on the device, lower the cache's budget or the maximum length, or choose a smaller "
            "model or dtype"
        )


class EngineDead(CoreError):
    """Terminal: the engine cannot go on. Carries the first failure as `__cause__`."""
