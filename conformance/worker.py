"""The process in which checks run: `python -m conformance.worker`. A crash or a hang costs one check.

The first line of standard input is the setup; each later one names a check, or is null, which asks for the
open device. Each is answered by one line of JSON on what was standard output when the process began; anything
that is printed goes to standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.check import Check, Context, Failed, Inherited, Missing, Result, check_seed
from conformance.status import Status
from conformance.subject import Subject, Target
from core.contract.errors import CoreError, DeviceError, UnsupportedError


@dataclass(frozen=True)
class Setup:
    """What a worker is told first. `modules`: further modules with checks."""

    target: Target
    seed: int
    modules: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, text: str) -> Setup:
        """From JSON."""
        found = json.loads(text)
        return cls(Target(**found["target"]), found["seed"], tuple(found["modules"]))

    def text(self) -> str:
        """As JSON, on one line."""
        return json.dumps(asdict(self))


def run_check(check: Check, subject: Subject, run_seed: int) -> Result:
    """Run one check here. Whatever it raises becomes a status."""
    seed = check_seed(run_seed, check.id)
    context = Context(subject, seed)
    start = time.monotonic()
    status, message, log = Status.PASS, "", ""
    try:
        with nullcontext() if subject.watch is None else subject.watch.over(context):
            check.run(context)
        if context.is_poor:
            status = Status.QUALITY_WARNING
    except Failed as error:
        status, message = Status.FAIL, str(error)
    except Inherited as error:
        status, message = Status.NOT_SUPPORTED, str(error)
    except Missing as error:
        status, message = Status.INFRA, str(error)
    except DeviceError as error:
        status, message, log = Status.FAIL, f"DeviceError: {error}", traceback.format_exc()
    except UnsupportedError as error:
        status, log = Status.FAIL, traceback.format_exc()
        message = f"the backend refuses what it declares: {error}"
    except CoreError as error:
        status, message, log = Status.FAIL, f"{type(error).__name__}: {error}", traceback.format_exc()
    except Exception as error:
        status, log = Status.FAIL, traceback.format_exc()
        message = f"unexpected {type(error).__name__}: {error}"
    duration = time.monotonic() - start
    return Result(check.id, status.value, message, duration, seed, context.metrics, log)


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    setup = Setup.of(sys.stdin.readline())

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    from conformance.catalogue import catalogue

    try:
        subject = Subject.of(setup.target)
        found = catalogue(subject.spec, setup.target, setup.seed, setup.modules, subject.floors)
        checks = {check.id: check for check in found}
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": len(checks)})
    for line in sys.stdin:
        asked = json.loads(line)
        answer(asdict(run_check(checks[asked], subject, setup.seed)) if asked else _device_of(subject))


def _device_of(subject: Subject) -> dict[str, Any]:
    """What the open device says of itself; {} where it does not open."""
    try:
        return asdict(subject.device.info)
    except Exception:
        traceback.print_exc()
        return {}


if __name__ == "__main__":
    main()
