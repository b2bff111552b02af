"""Checks that end in every way in which one can end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np

from conformance.check import Check, Context, Failed
from core.contract.errors import DeviceError
from core.contract.spec import BackendSpec


def good(context: Context) -> None:
    print("printed by a check")
    context.record("figure", 3)


def bad(context: Context) -> None:
    raise Failed("found 1, wanted 2")


def surprising(context: Context) -> None:
    raise KeyError("lost")


def crashing(context: Context) -> None:
    os._exit(17)


def killed(context: Context) -> None:
    os.kill(os.getpid(), 11)


def hanging(context: Context) -> None:
    time.sleep(60)


def broken_device(context: Context) -> None:
    raise DeviceError("the device does not answer")


def poor(context: Context) -> None:
    context.within(np.array([1.2]), np.array([0.0]), np.array([1.0]), rule="B")


ENDS = {
    "good": (good, "pass"),
    "bad": (bad, "fail"),
    "surprising": (surprising, "fail"),
    "crashing": (crashing, "crash"),
    "killed": (killed, "crash"),
    "hanging": (hanging, "timeout"),
    "broken-device": (broken_device, "fail"),
    "poor": (poor, "quality warning"),
    "after": (good, "pass"),
}


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for name, (run, _) in ENDS.items():
        yield Check(
            f"L7/ends/{name}", run, "ends in its own way", timeout_s=2.0 if name == "hanging" else 60.0
        )
    yield Check("L7/ends/unsupported", good, "needs what is not there", needs=("lengths_on_device",))
    yield Check("L7/ends/never-waived", bad, "may not be waived", is_waivable=False)
