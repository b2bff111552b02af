"""Runs the zoo: each fault against the tests of its family, each in workers of its own."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from conformance.catalogue import catalogue, lacking
from conformance.check import Check, Result
from conformance.runner import Worker, WorkerLost
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.worker import Setup
from conformance.zoo.clone import BASE
from conformance.zoo.faults import FAULTS, Fault

FAULT_S = 10.0
"""Time in which a fault must be found."""
_HANG_S = 5.0


@dataclass(frozen=True)
class Catch:
    """What became of one fault at one severity and seed. `by`: the test that found it, "" = none did."""

    fault: str
    severity: str
    seed: int
    by: str
    status: str
    message: str
    seconds: float
    tests: int


def variants(faults: Sequence[Fault] = FAULTS) -> list[tuple[Fault, str]]:
    """Every fault at each of its severities."""
    return [(fault, severity) for fault in faults for severity in fault.severities or ("",)]


def family_of(fault: Fault, checks: Sequence[Check], subject: Subject) -> list[Check]:
    """The tests that must find a fault, quick ones, those of the lowest level first."""
    return [
        check
        for check in checks
        if re.search(fault.caught_by, check.id)
        and check.is_quick
        and not lacking(check, subject.spec)
        and check.supported(subject.spec)
    ]


def hunt(fault: Fault, severity: str, seed: int) -> Catch:
    """Run a fault's tests until one finds it, or time is up."""
    target = Target(BASE, "float32", fault=f"{fault.name}:{severity}")
    clean = Subject.of(Target(BASE, "float32"))
    checks = family_of(fault, catalogue(clean.spec, clean.target, seed), clean)
    # Neighbouring tests are alike: a stride sees different ones early.
    stride = max(1, len(checks) // 12)
    order = [check for first in range(stride) for check in checks[first::stride]]
    start = time.monotonic()
    tests = 0
    worker: Worker | None = None
    try:
        for check in order:
            if time.monotonic() - start > FAULT_S:
                break
            tests += 1
            try:
                worker = worker or Worker(Setup(target, seed))
                result = worker.run(_in_time(check))
            except WorkerLost as lost:
                result = Result(check.id, lost.status.value, lost.message)
            if not Status(result.status).is_good:
                seconds = time.monotonic() - start
                return Catch(
                    fault.name, severity, seed, check.id, result.status, result.message, seconds, tests
                )
        return Catch(fault.name, severity, seed, "", "missed", "", time.monotonic() - start, tests)
    finally:
        if worker is not None:
            worker.close()


def _in_time(check: Check) -> Check:
    from dataclasses import replace

    return replace(check, timeout_s=min(check.timeout_s, _HANG_S))


def hunt_all(
    seeds: int, shard: tuple[int, int] = (1, 1), only: str = "", known: Sequence[Catch] = ()
) -> list[Catch]:
    """Every fault, severity and seed of a shard; what is `known` is not run again. Shows each as it ends."""
    done = {(c.fault, c.severity, c.seed): c for c in known}
    work = [
        (fault, severity, seed)
        for seed in range(seeds)
        for fault, severity in variants()
        if re.search(only, fault.name)
    ]
    found = []
    for i, (fault, severity, seed) in enumerate(work):
        if i % shard[1] != shard[0] - 1:
            continue
        catch = done.get((fault.name, severity, seed)) or hunt(fault, severity, seed)
        found.append(catch)
        name = f"{fault.number:>3} {fault.name}{f' {severity}' if severity else ''}"
        text = f"{catch.status:<8} by {catch.by} ({catch.tests} tests)" if catch.by else "MISSED"
        print(f"{name:<42} {text} {catch.seconds:.1f} s", flush=True)
        sys.stdout.flush()
    return found


def as_json(catches: Sequence[Catch]) -> list[dict[str, object]]:
    """For a report."""
    return [asdict(catch) for catch in catches]
