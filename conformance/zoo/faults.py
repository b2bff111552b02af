"""The faults: each a change of a few words in a backend's text, and the tests that must find it.

They are kept in `faults.toml`, whose head says what each field means.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.zoo.clone import BASE, Edit


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        number: in the catalogue. name: unique. what: in words.
        caught_by: a regular expression that the id of a test which finds it must contain.
        edits: `{s}` in a new text is the severity.
        severities: from coarse to fine; () = the fault has no degree.
        base: the backend whose text is changed. hang_s: after so long a test counts as hanging.
    """

    number: int
    name: str
    what: str
    caught_by: str
    edits: tuple[Edit, ...]
    severities: tuple[str, ...] = ()
    base: str = BASE
    hang_s: float = 5.0


def _read() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("faults.toml").read_text(encoding="utf-8"))


def _fault(entry: dict[str, Any]) -> Fault:
    edits = tuple((edit["module"], edit["old"], edit["new"]) for edit in entry["edit"])
    return Fault(
        entry.get("number", 0),
        entry["name"],
        entry["what"],
        entry.get("caught_by", ""),
        edits,
        tuple(entry.get("severities", ())),
        entry.get("base", BASE),
        entry.get("hang_s", 5.0),
    )


_TABLE = _read()
FAULTS = tuple(_fault(entry) for entry in _TABLE["fault"])
LEGAL = tuple(_fault(entry) for entry in _TABLE["legal"])
"""Changes that no check may mind; they have no number."""
NO_SUBJECT = {int(number): what for number, what in _TABLE["no_subject"].items()}
"""Faults of the catalogue whose subject is not here (yet), and what it would be."""
