"""Reports that were written before: read, held against their hash and their own figures, merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from conformance.check import Result, check_seed
from conformance.execution import EXECUTIONS
from conformance.report import SCHEMA, Report, digest, ids_digest, is_of_waiver
from conformance.status import Status
from core.contract.errors import ConfigError


def from_json(text: str, source: str) -> Report:
    """Read a report and hold it against its hash and its own statuses.

    Raises:
        ConfigError: it is no report, of another schema, or was changed.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ConfigError(f"{source} is no conformance report, but {type(found).__name__} in JSON")
        if missing := sorted({"sha256", "schema", "summary", "results", "waivers"} - set(found)):
            raise ConfigError(f"{source} is no conformance report: it lacks {', '.join(missing)}")
        claimed = found.pop("sha256")
        if found["schema"] != SCHEMA:
            raise ConfigError(
                f"{source} has schema {found['schema']}, but this suite reads {SCHEMA}, which tells how the "
                f"backend ran ({', '.join(EXECUTIONS)}); run it again"
            )
        if digest(found) != claimed:
            raise ConfigError(
                f"{source} was changed after it was written: its hash does not fit; run it again"
            )
        summary = found.pop("summary")
        results = tuple(Result(**result) for result in found.pop("results"))
        report = Report(results=results, **{**found, "waivers": tuple(found["waivers"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source} is no conformance report ({type(error).__name__}: {error})") from None
    if summary["exit_code"] != report.exit_code:
        raise ConfigError(
            f"{source} says exit code {summary['exit_code']}, its results say {report.exit_code}"
        )
    if (told := report.environment.get("execution")) not in EXECUTIONS:
        raise ConfigError(
            f"{source} does not tell how the backend ran: its execution is {told!r}, and one of "
            f"{', '.join(EXECUTIONS)} is wanted; run it again"
        )
    if summary["counts"] != report.counts or report.backend["spec_sha256"] != digest(report.backend["spec"]):
        raise ConfigError(f"{source} has counts or a hash of the spec that do not fit the rest; run it again")
    if summary["verdict"] != report.verdict:
        raise ConfigError(f"{source} says {summary['verdict']!r}, its results say {report.verdict!r}")
    try:
        wrong = _doubtful(report)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source} is no conformance report ({type(error).__name__}: {error})") from None
    if wrong:
        raise ConfigError(f"{source} cannot be what a run wrote: {wrong}; run it again")
    return report


def _doubtful(report: Report) -> str:
    """What does not fit among the results; "" for nothing."""
    seed = int(report.run["seed"], 16)
    seen: set[str] = set()
    for result in report.results:
        if result.id in seen:
            return f"{result.id} is there twice"
        seen.add(result.id)
        if is_of_waiver(result.id):
            continue
        if result.seed != check_seed(seed, result.id):
            return f"{result.id} has a seed that is not this run's"
        if result.status == Status.PASS and (over := _over(result)):
            return f"{result.id} passes, but its {over} is {result.metrics[over]}"
        if result.status == Status.WAIVED and not any(
            fnmatchcase(result.id, str(waiver["test"])) for waiver in report.waivers
        ):
            return f"{result.id} is waived, but no waiver names it"
    if report.run["shard"] == [1, 1] and ids_digest(seen) != report.run["ids_sha256"]:
        return "its checks are not those that the run took"
    return ""


def _over(result: Result) -> str:
    """The name of a figure beyond its bound; "" for none."""
    for name, value in result.metrics.items():
        if name in ("ratio_A", "ratio_B", "ratio_B_rms", "ratio_B_median") and not float(value) <= 1:
            return name
    return ""


def validate(text: str, source: str) -> None:
    """Hold a report against the schema of its form.

    Raises:
        ConfigError: it does not fit; names the place.
    """
    try:
        import jsonschema
    except ImportError:
        raise ConfigError("verifying needs jsonschema; install core[conformance]") from None
    schema = json.loads((Path(__file__).parent / "report.schema.json").read_text(encoding="utf-8"))
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        place = "/".join(map(str, getattr(error, "absolute_path", ())))
        what = getattr(error, "message", error)
        raise ConfigError(
            f"{source} does not fit the schema of reports at {place or 'its top'}: {what}"
        ) from None


_SAME = ("seed", "levels", "only", "profiles", "dtype", "device", "options", "fault", "quick", "ids_sha256")
"""Facts of a run that all its shards share."""
_SAME_PLACE = ("device", "driver", "execution", "packages", "commit")
"""Facts of the environment that they share."""


def _facts_of(report: Report) -> dict[str, object]:
    """What is equal in all shards of a run."""
    run, where = report.run, report.environment
    return {
        "suite": report.suite,
        "backend": report.backend,
        **{name: run[name] for name in _SAME},
        "checks": run["checks"],
        "constraints": run.get("constraints", ""),
        **{f"environment's {name}": where[name] for name in _SAME_PLACE},
        "number of shards": run["shard"][1],
    }


def merge(reports: Sequence[Report], sources: Sequence[str]) -> Report:
    """One report of all shards of a run.

    Raises:
        ConfigError: they are not shards of one run, one is there twice, or a shard or check is missing.
    """
    first = reports[0]
    wanted = _facts_of(first)
    for report, source in zip(reports, sources, strict=True):
        found = _facts_of(report)
        if other := [name for name in wanted if digest(found[name]) != digest(wanted[name])]:
            hint = "; give every shard the same --seed" if "seed" in other else ""
            raise ConfigError(
                f"{source} and {sources[0]} are not shards of one run: their {', '.join(other)} differ{hint}"
            )
    shards = [report.run["shard"][0] for report in reports]
    count = first.run["shard"][1]
    if sorted(shards) != list(range(1, count + 1)):
        raise ConfigError(f"shards {sorted(shards)} of {count} were given; every one is wanted, once")
    results: dict[str, Result] = {}
    for report in reports:
        for result in report.results:
            old = results.get(result.id)
            # Level 0 is in each shard; the worst that was seen counts.
            if old is None or (Status(old.status).is_good and not Status(result.status).is_good):
                results[result.id] = result
    if ids_digest(results) != first.run["ids_sha256"]:
        raise ConfigError("the shards together lack checks that the run took; run them again")
    ordered = tuple(sorted(results.values(), key=lambda r: (int(r.id[1]), r.id)))
    return replace(first, results=ordered, run={**first.run, "shard": [1, 1], "merged": count})
