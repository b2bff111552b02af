"""How a backend ran on its device: natively, emulated, or compiled only."""

from __future__ import annotations

from typing import get_args

from core.contract.errors import ConfigError
from core.contract.types import DeviceInfo, Execution

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
"""The closed set; "native" is the first."""


def execution_of(info: DeviceInfo | None, claimed: str) -> Execution:
    """How a backend ran, by its device's word and by that of who runs the suite.

    The device knows where it runs, so "native" is its word alone; who runs the suite may know better that the
    device is a stand-in, and take "native" back. Without a known word it counts as
    emulated.

    Args:
        info: of the open device, None = there is none. claimed: "" = as the device says.

    Raises:
        ConfigError: the claim is not known, or takes nothing back.
    """
    told = info.execution if info is not None and info.execution in EXECUTIONS else "emulated"
    if claimed in ("", told):
        return told
    if claimed not in EXECUTIONS:
        raise ConfigError(f"--execution is {claimed!r}; one of {', '.join(EXECUTIONS[1:])} is wanted")
    if told != "native":
        raise ConfigError(
            f"--execution is {claimed!r}, but the device says {told!r}; only a native one can be less than "
            "it says, so leave the option out, or let the backend say otherwise in DeviceInfo.execution"
        )
    return EXECUTIONS[EXECUTIONS.index(claimed)]
