"""Waivers: a vendor's own list of what is known to be wrong, why, who mends it, and until when."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion

from conformance.check import Check, Result
from conformance.report import OF_WAIVER
from conformance.status import Status
from conformance.subject import Subject
from core.contract.errors import ConfigError

MAX_DAYS = 90


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One entry of `[[waiver]]`; every field is required.

    Attributes:
        test: an id, with * for any part of the name (not of level and family). device: pattern of the
            device's name. driver: range of its versions such as ">=535,<550", or a pattern; "*" = any.
        issue: URL. reason: why it fails. impact: what users will see. owner: who mends it.
        opened, expires: dates, at most 90 days apart.
    """

    test: str
    device: str
    driver: str
    issue: str
    reason: str
    impact: str
    owner: str
    opened: date
    expires: date


def read_waivers(path: Path | None) -> tuple[Waiver, ...]:
    """Read a waivers file; () for none.

    Raises:
        ConfigError: it cannot be read, lacks a field, or waives for too long or too much.
    """
    if path is None:
        return ()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"waivers {path} cannot be read ({error}); give a TOML file with [[waiver]] tables"
        ) from None
    wrong = set(found) - {"waiver"}
    if wrong:
        raise ConfigError(f"waivers {path} has {sorted(wrong)[0]!r}; only [[waiver]] tables are known")
    return tuple(_waiver(entry, i, path) for i, entry in enumerate(found.get("waiver", ()), 1))


def _waiver(entry: object, number: int, path: Path) -> Waiver:
    where = f"waiver {number} of {path}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is no table")
    names = {f.name for f in fields(Waiver)}
    if missing := sorted(names - set(entry)):
        raise ConfigError(f"{where} lacks {', '.join(missing)}; all of {', '.join(sorted(names))} are wanted")
    if unknown := sorted(set(entry) - names):
        raise ConfigError(f"{where} has {unknown[0]!r}, which is not known")
    for name in names - {"opened", "expires"}:
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise ConfigError(f"{where}: {name} is {entry[name]!r}; a text is wanted")
    for name in ("opened", "expires"):
        if not isinstance(entry[name], date) or isinstance(entry[name], datetime):
            raise ConfigError(f"{where}: {name} is {entry[name]!r}; a date such as 2030-01-31 is wanted")
    waiver = Waiver(**entry)
    days = (waiver.expires - waiver.opened).days
    if not 0 <= days <= MAX_DAYS:
        raise ConfigError(f"{where} lasts {days} days; 0 to {MAX_DAYS} are allowed")
    try:
        _is_in("0", waiver.driver)
    except InvalidSpecifier:
        raise ConfigError(
            f"{where}: driver is {waiver.driver!r}; a range such as >=535,<550 or a pattern is wanted"
        ) from None
    parts = waiver.test.split("/")
    if len(parts) != 3 or "*" in parts[0] + parts[1]:
        raise ConfigError(
            f"{where}: test is {waiver.test!r}; one level and family, such as L2/attend/window-*, is wanted"
        )
    return waiver


def apply(
    waivers: Sequence[Waiver],
    results: Sequence[Result],
    checks: Sequence[Check],
    subject: Subject,
    driver: str,
) -> tuple[list[Result], list[Waiver]]:
    """Results with what is waived, and the waivers that concern this device.

    A waiver that has ended, that matches no check of the suite, that names one which passes or one which
    may never be waived, gives a result of its own that ends the run. But for passing, that holds for waivers
    of other devices, too.

    Args:
        checks: all of the suite for this backend, whether or not this run takes them.
    """
    today = datetime.now(UTC).date()
    by_id = {check.id: check for check in checks}
    found = {result.id: result for result in results}
    problems: list[Result] = []
    used: list[Waiver] = []
    for waiver in waivers:
        is_ours = fnmatchcase(subject.info.name, waiver.device) and _is_in(driver, waiver.driver)
        if is_ours:
            used.append(waiver)
        if problem := _problem(waiver, found if is_ours else {}, by_id, today):
            name = f"{waiver.test.rpartition('/')[0]}/{OF_WAIVER}{len(problems) + 1}"
            problems.append(Result(name, Status.XPASS.value, f"the waiver of {waiver.test} {problem}"))
            continue
        for i in fnmatch.filter(found, waiver.test) if is_ours else ():
            if not Status(found[i].status).is_good:
                found[i] = replace(
                    found[i], status=Status.WAIVED.value, waiver=f"{waiver.issue}: {waiver.impact}"
                )
    return [*found.values(), *problems], used


def _problem(waiver: Waiver, found: Mapping[str, Result], by_id: Mapping[str, Check], today: date) -> str:
    """What is wrong with a waiver; "" for nothing."""
    matched = fnmatch.filter([*by_id, *(i for i in found if i not in by_id)], waiver.test)
    if today > waiver.expires:
        return f"expired on {waiver.expires}: mend the backend, or open a new one"
    if today < waiver.opened:
        return f"begins on {waiver.opened}, which is not yet"
    if not matched:
        return "matches no check of this suite: delete it"
    if forbidden := [i for i in matched if i in by_id and not by_id[i].is_waivable]:
        return f"names {forbidden[0]}, which may never be waived"
    if passing := [i for i in matched if i in found and found[i].status == Status.PASS]:
        return f"names {passing[0]}, which passes: delete it, or name fewer checks"
    return ""


def _is_in(driver: str, versions: str) -> bool:
    """Whether a driver's version is of a range such as ">=535,<550", or matches a pattern."""
    if versions[0] not in "<>=!~":
        return fnmatchcase(driver, versions)
    try:
        return SpecifierSet(versions).contains(driver, prereleases=True)
    except InvalidVersion:
        return False
