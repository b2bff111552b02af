"""A run's report: what was tested, on what, with what outcome; as JSON, JUnit, Markdown and a badge."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conformance import SUITE
from conformance.catalogue import LEVELS
from conformance.check import Check, Result, check_seed
from conformance.execution import execution_of
from conformance.status import CONFORMS, EMPTY, EXIT_MEANING, Status, exit_code
from conformance.subject import Subject, Target
from core.contract import CONTRACT
from core.contract.types import DeviceInfo, Execution

SCHEMA = 2
OF_WAIVER = "waiver-"
"""How the name of a result begins that says what is wrong with a waiver."""


@dataclass(frozen=True)
class Report:
    """Everything that is written down of a run. Hashes are SHA-256 in hex.

    Attributes:
        suite: version, contract and hash of the list of checks. backend: name, version of its distribution,
            provider of kernels, hash of its spec, and the spec.
        environment: machine, driver, versions, and how the backend ran ("execution": native, emulated or
            compiled). run: what was asked for, and how many checks each level has without a filter or shard.
        results: in the order of the checks.
    """

    suite: Mapping[str, Any]
    backend: Mapping[str, Any]
    environment: Mapping[str, Any]
    run: Mapping[str, Any]
    results: tuple[Result, ...]
    schema: int = SCHEMA
    waivers: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def counts(self) -> Counter[str]:
        """Results by status."""
        return Counter(result.status for result in self.results)

    @property
    def exit_code(self) -> int:
        """What the run ends with."""
        return exit_code([Status(result.status) for result in self.results])

    @property
    def verdict(self) -> str:
        """One line. A run of a part of the checks says so, and never that the backend conforms."""
        meaning = EXIT_MEANING[self.exit_code]
        if self.part and self.exit_code == CONFORMS:
            meaning = "nothing is wrong in this part"
        counts = ", ".join(f"{n} {status}" for status, n in sorted(self.counts.items()))
        levels = f"{self.run['levels_text']}{f' {self.emulated}' if self.emulated else ''}"
        if self.part:
            levels = f"a part of {levels} ({self.part})"
        name = f"{self.backend['name']} ({self.execution})"
        absent = ", ".join(f"L{level}" for level in self.without_case())
        absent = f"; no case for this backend: {absent}" if absent else ""
        return f"{name}, {levels}: {meaning} ({counts or 'no checks'}{absent})"

    @property
    def part(self) -> str:
        """What was left out of the levels, in words; "" for a whole run."""
        shard = self.run["shard"]
        named = {
            "--only": self.run["only"],
            "--profile": ",".join(self.run["profiles"]),
            "shard": f"{shard[0]}/{shard[1]}" if shard[1] > 1 else "",
        }
        return ", ".join(f"{name} {text}" for name, text in named.items() if text)

    def without_case(self) -> tuple[int, ...]:
        """Levels of which every check needs what the backend does not declare, or which have none."""
        return tuple(
            level
            for level, counts in sorted(self.by_level().items())
            if not set(counts) - {Status.NOT_SUPPORTED}
        )

    @property
    def execution(self) -> Execution:
        """How the backend ran."""
        found: Execution = self.environment["execution"]
        return found

    @property
    def emulated(self) -> str:
        """That the run was under constraints, in words; "" where it was not."""
        name = self.run.get("constraints", "")
        return (
            f"under the constraints {name} (emulated: the rules of its steps, not its hardware)"
            if name
            else ""
        )

    def by_level(self) -> dict[int, Counter[str]]:
        """Statuses of each level that was asked for; empty where it has no case."""
        found: dict[int, Counter[str]] = {level: Counter() for level in self.run["levels"]}
        for result in self.results:
            found.setdefault(int(result.id[1]), Counter())[result.status] += 1
        return found


def digest(value: object) -> str:
    """Hash of a value's JSON, keys sorted."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def ids_digest(ids: Iterable[str]) -> str:
    """Hash of a set of ids of checks. What a waiver brought into a report is no check."""
    return digest(sorted(i for i in ids if not is_of_waiver(i)))


def is_of_waiver(check_id: str) -> bool:
    """Whether a result says what is wrong with a waiver."""
    return check_id.rpartition("/")[2].startswith(OF_WAIVER)


def suite_facts(checks: Iterable[Check]) -> dict[str, Any]:
    """The suite's own version, and the checks that it has for this backend."""
    return {
        "version": SUITE,
        "contract": list(CONTRACT),
        "checks_sha256": digest(sorted(check.id for check in checks)),
    }


def backend_facts(subject: Subject) -> dict[str, Any]:
    """The backend under test."""
    spec = asdict(subject.spec)
    return {
        "name": subject.spec.name,
        "target": subject.target.backend,
        "summary": subject.spec.summary,
        "version": _distribution_of(subject),
        "spec_sha256": digest(spec),
        "spec": spec,
    }


def _distribution_of(subject: Subject) -> str:
    package = subject.place.partition(":")[0]
    for found in distributions():
        points = found.entry_points.select(group="core.backends")
        if any(point.value.partition(":")[0] == package for point in points):
            return f"{found.metadata['Name']} {found.version}"
    return ""


def environment_facts(info: DeviceInfo | None, claimed: str = "") -> dict[str, Any]:
    """The machine, the device (None = the backend did not load), and the versions of what computes.

    Args:
        claimed: how the backend runs, where less than the device says; "" = as it says.

    Raises:
        ConfigError: as `execution_of`.
    """
    packages = {}
    for name in ("core", "numpy", "ml_dtypes", "torch", "jax", "jaxlib", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": info.name if info else "",
        "device_index": info.index if info else 0,
        "driver": info.driver if info else "",
        "execution": execution_of(info, claimed),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": os.environ.get("CORE_COMMIT", ""),
    }


def run_facts(
    levels: Sequence[int],
    seed: int,
    shard: tuple[int, int],
    target: Target,
    quick: bool,
    start: datetime,
    kept: Sequence[str] = (),
    only: str = "",
    profiles: Sequence[str] = (),
    checks: Iterable[Check] | None = None,
    ids: Iterable[str] = (),
) -> dict[str, Any]:
    """What was asked for.

    Args:
        ids: of the checks that all shards of the run take together.
        kept: rules of the backend's that the constraints could not replace.
        only, profiles: what was left out of the levels.
        checks: those that the levels have where nothing is left out; their count tells a part from the whole.
            None = they are not known.
    """
    numbers = Counter(check.level for check in checks or ())
    return {
        "levels": list(levels),
        "levels_text": levels_text(levels),
        "checks": {} if checks is None else {f"L{level}": numbers[level] for level in levels},
        "only": only,
        "profiles": list(profiles),
        "ids_sha256": ids_digest(ids),
        "seed": f"{seed:016x}",
        "dtype": target.dtype,
        "device": target.index,
        "options": dict(target.options),
        "fault": target.fault,
        "constraints": target.constraints,
        "kept": list(kept),
        "quick": quick,
        "shard": list(shard),
        "start": start.isoformat(timespec="seconds"),
        "end": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["core", *sys.argv[1:]]),
    }


def of_refused(target: Target, levels: Sequence[int], seed: int, reason: str) -> Report:
    """Report of a backend that core does not load: its first check fails, and nothing else was run."""
    first = "L0/registration/loads"
    return Report(
        suite=suite_facts(()),
        backend={
            "name": target.backend,
            "target": target.backend,
            "summary": "",
            "version": "",
            "spec_sha256": digest({}),
            "spec": {},
        },
        environment=environment_facts(None),
        run=run_facts(levels, seed, (1, 1), target, True, datetime.now(UTC), ids=(first,)),
        results=(Result(first, Status.FAIL.value, reason, 0.0, check_seed(seed, first)),),
    )


def levels_text(levels: Sequence[int]) -> str:
    """ "L0..L5", or a list."""
    if len(levels) > 1 and list(levels) == list(range(levels[0], levels[-1] + 1)):
        return f"L{levels[0]}..L{levels[-1]}"
    return ",".join(f"L{level}" for level in levels)


# Writing


def to_json(report: Report) -> str:
    """The report as text; `conformance.reading` reads it."""
    found = asdict(report)
    found["summary"] = {
        "counts": dict(sorted(report.counts.items())),
        "exit_code": report.exit_code,
        "verdict": report.verdict,
    }
    found["sha256"] = digest(found)
    return json.dumps(found, indent=1, sort_keys=True, default=str)


def to_junit(report: Report) -> str:
    """JUnit XML, a suite per level."""
    root = ElementTree.Element("testsuites", name=f"conformance of {report.backend['name']}")
    for level in report.by_level():
        own = [r for r in report.results if int(r.id[1]) == level]
        bad = [r for r in own if not Status(r.status).is_good]
        skipped = [r for r in own if r.status == Status.NOT_SUPPORTED]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"L{level} {LEVELS[level]}",
            tests=str(len(own)),
            failures=str(len(bad)),
            skipped=str(len(skipped)),
            time=f"{sum(r.duration_s for r in own):.3f}",
        )
        for r in own:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"L{level}.{r.id.split('/')[1]}",
                name=r.id,
                time=f"{r.duration_s:.3f}",
            )
            properties = ElementTree.SubElement(case, "properties")
            for name, value in {"status": r.status, "seed": f"{r.seed:016x}", **r.metrics}.items():
                ElementTree.SubElement(properties, "property", name=name, value=str(value))
            if not Status(r.status).is_good:
                ElementTree.SubElement(
                    case, "failure", message=_clean(r.message), type=r.status
                ).text = _clean(r.log)
            elif r.status == Status.NOT_SUPPORTED:
                ElementTree.SubElement(case, "skipped", message=_clean(r.message))
    return ElementTree.tostring(root, encoding="unicode")


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or ord(c) >= 32)


def arithmetic_text(report: Report) -> str:
    """What the backend declares of its arithmetic in the run's dtype: the bounds follow from it."""
    spec, dtype = report.backend["spec"], report.run["dtype"]
    if not spec:
        return "not told"
    sums = spec["accumulator"]
    is_rounded = spec["attention"].get("probability", "accumulator") == "compute"
    return f"results {dtype}, sums {sums}, attention weights {dtype if is_rounded else sums}"


def to_markdown(report: Report) -> str:
    """A page for people."""
    b, e = report.backend, report.environment
    lines = [
        f"# Conformance of `{b['name']}`",
        "",
        f"{report.verdict}.",
        *_kept(report),
        "",
        f"Suite {report.suite['version']}, contract {'.'.join(map(str, report.suite['contract']))}; "
        f"{b['summary']} ({b['version'] or 'not installed as a distribution'}); {e['device']}, "
        f"{report.execution}, {e['platform']}, Python {e['python']}, "
        + ", ".join(f"{name} {v}" for name, v in e["packages"].items())
        + f"; {report.run['dtype']}, seed {report.run['seed']}"
        + (f"; commit {e['commit']}" if e["commit"] else "")
        + ".",
        "",
        f"Declared arithmetic: {arithmetic_text(report)}.",
        "",
        "| level | pass | fail | not supported | other | rule A, worst ratio | rule B | rule C, z |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for level, counts in report.by_level().items():
        if not counts:
            lines.append(f"| L{level} {LEVELS[level]} | no case | | | | | | |")
            continue
        rest = sum(counts.values()) - sum(counts[s] for s in (Status.PASS, Status.FAIL, Status.NOT_SUPPORTED))
        figures = " | ".join(_largest(report, level, name) for name in ("ratio_A", "ratio_B", "bias_z"))
        lines.append(
            f"| L{level} {LEVELS[level]} | {counts[Status.PASS]} | {counts[Status.FAIL]} | "
            f"{counts[Status.NOT_SUPPORTED]} | {rest} | {figures} |"
        )
    bad = [r for r in report.results if not Status(r.status).is_good]
    if bad:
        lines += ["", "## What is wrong", ""]
        lines += [f"- `{r.id}` ({r.status}): {r.message}" for r in bad]
    return "\n".join(lines) + "\n"


def _kept(report: Report) -> list[str]:
    kept = report.run.get("kept", ())
    return (
        ["", f"Rules of the backend's own stand in place of the constraints': {', '.join(kept)}."]
        if kept
        else []
    )


def _largest(report: Report, level: int, figure: str) -> str:
    """The largest of a figure among a level's checks; "" where none has it."""
    own = [r.metrics for r in report.results if int(r.id[1]) == level]
    found = [float(metrics[figure]) for metrics in own if figure in metrics]
    return f"{max(found):.2f}" if found else ""


def badge_text(report: Report) -> str:
    """What a badge says: the highest level up to which every one passed; or the constraints."""
    if name := report.run.get("constraints", ""):
        outcome = "pass" if report.exit_code == 0 else "none"
        return f"conformance {report.suite['version']} · {name} rules · emulated · {outcome}"
    if report.part:
        return f"conformance {report.suite['version']} · none · a part of the checks"
    reached, absent = -1, report.without_case()
    for level, counts in sorted(report.by_level().items()):
        if any(not Status(status).is_good for status in counts):
            break
        # A level that has no case for the backend is stepped over, and is no grade.
        if level not in absent:
            reached = level
        elif level == 0:
            break
    grade = f"L{reached}" if reached >= 0 else "none"
    waived = report.counts[Status.WAIVED]
    how = "" if report.execution == "native" else f"{report.execution} · "
    return f"conformance {report.suite['version']} · {grade} · {how}{report.run['dtype']} · {waived} waivers"


def to_badge(report: Report) -> str:
    """An SVG of `badge_text`."""
    text = badge_text(report)
    color = "#2e7d32" if report.exit_code in (0, EMPTY) and "none" not in text else "#b71c1c"
    width = 7 * len(text) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{text}">'
        f'<rect width="{width}" height="20" rx="3" fill="{color}"/>'
        f'<text x="10" y="14" fill="#fff" font-family="Verdana,sans-serif" font-size="11">{text}</text>'
        "</svg>\n"
    )


def write(report: Report, folder: Path) -> None:
    """Write report.json, junit.xml, report.md, report.html and badge.svg."""
    from conformance.page import to_html

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "report.json": to_json(report),
        "junit.xml": to_junit(report),
        "report.md": to_markdown(report),
        "report.html": to_html(report),
        "badge.svg": to_badge(report),
    }.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
