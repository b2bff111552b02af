"""Runs the zoo: each fault against the tests of its family, each in workers of its own."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from conformance import SUITE
from conformance.catalogue import catalogue, lacking, parse_levels, select
from conformance.check import Check, Result
from conformance.runner import Worker, WorkerLost, run_all
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.worker import Setup
from conformance.zoo.clone import BASE
from conformance.zoo.faults import FAULTS, LEGAL, Fault
from conformance.zoo.mutation import Fate
from core.contract.errors import ConfigError

_OF_FILES = ("L0/registration/imports-the-contract-alone", "L0/registration/no-side-effects")
"""Checks that read a backend's files, which a clone in memory has not."""
FAULT_S = 10.0
"""Time in which a fault must be found."""


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
    target = Target(fault.base, "float32", fault=f"{fault.name}:{severity}")
    clean = Subject.of(Target(fault.base, "float32"))
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
                result = worker.run(_in_time(check, fault))
            except WorkerLost as lost:
                if lost.status is Status.INFRA:
                    raise ConfigError(f"the clone with {fault.name} does not load: {lost.message}") from lost
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


def _in_time(check: Check, fault: Fault) -> Check:
    return replace(check, timeout_s=min(check.timeout_s, fault.hang_s))


def hunt_all(
    seeds: int,
    shard: tuple[int, int] = (1, 1),
    only: str = "",
    known: Sequence[Catch] = (),
    keep: Callable[[Sequence[Catch]], None] = lambda found: None,
) -> list[Catch]:
    """Every fault, severity and seed of a shard, and all that are `known`, which are not run again. Shows
    each as it ends.

    Args:
        keep: is given what is found so far, after each.
    """
    done = {(c.fault, c.severity, c.seed): c for c in known}
    work = [
        (fault, severity, seed)
        for seed in range(seeds)
        for fault, severity in variants()
        if re.search(only, fault.name)
    ]
    found = {}
    for i, (fault, severity, seed) in enumerate(work):
        key = (fault.name, severity, seed)
        if key in done:
            found[key] = done[key]
        elif i % shard[1] == shard[0] - 1:
            catch = found[key] = hunt(fault, severity, seed)
            name = f"{fault.number:>3} {fault.name}{f' {severity}' if severity else ''}"
            text = f"{catch.status:<8} by {catch.by} ({catch.tests} tests)" if catch.by else "MISSED"
            print(f"{name:<42} {text} {catch.seconds:.1f} s", flush=True)
            keep(list(found.values()))
    return list(found.values())


@dataclass(frozen=True)
class Alarms:
    """A run of a backend that is right: how many checks it had, and which of them did not pass.

    Attributes:
        dtype: compute dtype. Results that were written without one are of float32.
    """

    backend: str
    seed: int
    levels: str
    checks: int
    alarms: tuple[str, ...]
    seconds: float
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alarms", tuple(self.alarms))


def alarms_of(target: Target, seed: int, levels: str, jobs: int) -> Alarms:
    """Run the quick checks of some levels against a backend that is right."""
    subject = Subject.of(target)
    checks = [
        check
        for check in select(catalogue(subject.spec, target, seed), parse_levels(levels))
        if not lacking(check, subject.spec)
        and check.supported(subject.spec)
        and not (target.fault and check.id in _OF_FILES)
    ]
    found: list[Result] = []
    start = time.monotonic()
    run_all(checks, Setup(target, seed), found.append, jobs)
    bad = tuple(sorted(f"{r.id}: {r.message}" for r in found if not Status(r.status).is_good))
    seconds = time.monotonic() - start
    return Alarms(_name(target), seed, levels, len(found), bad, seconds, target.dtype)


def _name(target: Target) -> str:
    return f"{target.backend}{f', {target.fault}'.rstrip(':') if target.fault else ''}"


def clean_targets(backends: Sequence[str], dtype: str) -> list[Target]:
    """Clean backends in a dtype, and the reference under every legal change where it declares that dtype;
    "auto" is each one's first.

    Raises:
        BackendMissing, BackendRefused: as these say. ConfigError: a clean backend declares no such dtype.
    """
    clean = [Subject.declared(Target(name, dtype)).target for name in backends]
    has = Subject.of(Target(BASE)).spec.dtypes
    if dtype not in ("auto", *has):
        print(f"{BASE} declares {', '.join(has)}: without its legal changes in {dtype}", flush=True)
        return clean
    legal = [Target(BASE, dtype, fault=f"{change.name}:") for change in LEGAL]
    return clean + [Subject.declared(target).target for target in legal]


def all_alarms(
    backends: Sequence[str],
    dtype: str,
    seeds: int,
    levels: str,
    shard: tuple[int, int] = (1, 1),
    known: Sequence[Alarms] = (),
    jobs: int = 2,
    keep: Callable[[Sequence[Alarms]], None] = lambda found: None,
) -> list[Alarms]:
    """Those of `clean_targets` over seeds: the runs of a shard, and all that are `known`, which are not done
    again. Shows each as it ends.

    Args:
        jobs: workers of a run. keep: is given what is found so far, after each.
    """
    targets = clean_targets(backends, dtype)
    done = {(a.backend, a.dtype, a.seed, a.levels): a for a in known}
    found = {}
    for i, (seed, target) in enumerate((seed, target) for seed in range(seeds) for target in targets):
        name = _name(target)
        key = (name, target.dtype, seed, levels)
        if key in done:
            found[key] = done[key]
        elif i % shard[1] == shard[0] - 1:
            one = found[key] = alarms_of(target, seed, levels, jobs)
            text = f"{len(one.alarms)} alarms in {one.checks} checks, {one.seconds:.1f} s"
            print(f"seed {seed:>2} {name:<40} {target.dtype:<8} {text}", flush=True)
            for alarm in one.alarms:
                print(f"  {alarm}", flush=True)
            keep(list(found.values()))
    return list(found.values())


_Kind = TypeVar("_Kind", Catch, Alarms, Fate)


def write_results(
    path: Path, found: Sequence[Catch | Alarms | Fate], counts: Mapping[str, int] | None = None
) -> None:
    """Write what was found, with the commit that CORE_COMMIT names and the version of the suite."""
    table = {
        "commit": os.environ.get("CORE_COMMIT", ""),
        "suite": SUITE,
        **({"counts": dict(counts)} if counts is not None else {}),
        "results": [asdict(one) for one in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Entries of such a file; it may be of another commit.

    Raises:
        ConfigError: it is none.
    """
    return _read(path)[1]


def resumed(kind: type[_Kind], paths: Sequence[Path]) -> list[_Kind]:
    """What files hold that a run goes on from.

    Raises:
        ConfigError: one is none, or of another commit or version of the suite.
    """
    found: list[_Kind] = []
    here = (os.environ.get("CORE_COMMIT", ""), SUITE)
    for path in paths:
        made, entries = _read(path)
        if made != here:
            names = [f"commit {commit or 'not told'}, suite {suite}" for commit, suite in (made, here)]
            raise ConfigError(
                f"{path} is of {names[0]}, this run of {names[1]} (CORE_COMMIT tells the commit); "
                "delete the file or leave it out"
            )
        try:
            found += [kind(**entry) for entry in entries]
        except TypeError as error:
            raise ConfigError(f"{path} cannot be resumed ({error}); delete it") from None
    return found


def _read(path: Path) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return (table["commit"], table["suite"]), table["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be resumed ({type(error).__name__}: {error}); delete it") from None
