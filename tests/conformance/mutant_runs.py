"""What tests of mutants do in a process of its own; each function asserts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from conformance.cli import app
from conformance.zoo import mutation
from conformance.zoo.mutants import Mutant, equivalents, mutants, texts
from conformance.zoo.mutation import Battery, Fate, battery, counts, judged, score, try_mutant


@cache
def states() -> Battery:
    """Checks of the state ops."""
    found = battery("state", 0)
    return Battery([c for c in found.checks if "state_scan-raw" in c.id], found.seconds)


def decay(text: str | None = None) -> Mutant:
    """A mutant of the states' decay; with another text, where one is given."""
    found = next(m for m in mutants(["state"]) if m.before.startswith("decay =") and "(rate)" in m.after)
    return found if text is None else replace(found, text=text)


def kill_one() -> None:
    """The check that finds it is asked first from then on."""
    fate = try_mutant(decay(), states(), 0)
    assert fate.status == "killed" and fate.by.startswith("L2/state_scan/") and fate.message
    assert states().order()[0].id == fate.by


def kill_those_that_do_not_answer() -> None:
    """Endless, ending the process, not loading."""
    mutation._HANG_S = 0.5
    text = texts()["state"]
    inside = '    """As `Ops.state_scan`, in float64.'
    for what, message in (("while True: pass", "no end in"), ("import os; os._exit(3)", "the process ended")):
        changed = text.replace(inside, f"    {what}\n{inside}")
        assert changed != text
        fate = try_mutant(decay(changed), states(), 0)
        assert fate.status == "killed" and message in fate.message
    assert try_mutant(decay("1 / 0"), states(), 0).by == "loading"


def let_one_survive() -> None:
    """A text without a change survives; one of the list is excused."""
    fate = try_mutant(decay(texts()["state"]), states(), 0)
    assert fate.status == "survived" and fate.by == ""
    excused = equivalents()[0]
    same = replace(fate, module=excused.module, function=excused.function)
    same = replace(same, before=excused.before, after=excused.after)
    assert [f.status for f in judged([fate, same])] == ["survived", "equivalent"]
    assert counts(judged([fate, same])) == {"killed": 0, "survived": 1, "equivalent": 1}
    assert score(judged([replace(fate, status="killed"), same])) == 1.0


def write_and_resume(folder: Path) -> None:
    """`core conformance mutants`, twice."""
    out = folder / "mutants.json"
    command = ["mutants", "--module", "state", "--limit", "2", "--out", str(out)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code in (0, 1), found.output
    assert "2 mutants" in found.output
    first = json.loads(out.read_text(encoding="utf-8"))["results"]
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert "4 mutants" in again.output
    kept = {Fate(**entry).key for entry in json.loads(out.read_text(encoding="utf-8"))["results"]}
    assert {Fate(**entry).key for entry in first} < kept
    assert asdict(Fate(**first[0])) == first[0]
