"""What may become of a test, and what a run's exit status says."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """A closed set: whatever happens to a test is one of these."""

    PASS = "pass"
    FAIL = "fail"
    CRASH = "crash"
    TIMEOUT = "timeout"
    DEVICE_LOST = "device lost"
    NOT_SUPPORTED = "not supported"
    WAIVED = "waived"
    XPASS = "unexpected pass"
    QUALITY_WARNING = "quality warning"
    BLOCKED = "blocked"
    INFRA = "infrastructure"
    NOT_RUN = "not run"

    @property
    def is_good(self) -> bool:
        """Whether a run may end well with it."""
        return self in _GOOD


_GOOD = (Status.PASS, Status.NOT_SUPPORTED, Status.WAIVED, Status.QUALITY_WARNING)

CONFORMS = 0
FAILURES = 1
USAGE = 2
NO_DEVICE = 3
WAIVERS = 4
EMPTY = 5
INCOMPLETE = 6
SELF_TEST = 7
MISMATCH = 8

EXIT_MEANING = {
    CONFORMS: "conforms at the level that was asked for",
    FAILURES: "tests failed",
    USAGE: "wrong usage or configuration",
    NO_DEVICE: "the backend or its device is not available",
    WAIVERS: "a waiver is expired, matches nothing, or its test passes",
    EMPTY: "nothing was selected, or mandatory tests are missing",
    INCOMPLETE: "tests crashed, timed out or were not run",
    SELF_TEST: "the suite's own check failed",
    MISMATCH: "reports do not belong together, or were changed",
}


def exit_code(statuses: list[Status]) -> int:
    """Of a run with these statuses, by the worst of them.

    A waiver that is wrong comes first: what it hides is not known.
    """
    found = set(statuses)
    if not found - {Status.NOT_SUPPORTED, Status.NOT_RUN}:
        return EMPTY
    if Status.XPASS in found:
        return WAIVERS
    if Status.FAIL in found:
        return FAILURES
    if found & {
        Status.CRASH,
        Status.TIMEOUT,
        Status.DEVICE_LOST,
        Status.INFRA,
        Status.NOT_RUN,
        Status.BLOCKED,
    }:
        return INCOMPLETE
    return CONFORMS
