"""Mutants of the oracle: which there are, that they are hunted under a watchdog, and what is excused."""

from __future__ import annotations

import ast
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from conformance.zoo import mutation
from conformance.zoo.mutants import Equivalent, Mutant, equivalents, mutants, of_text, texts
from conformance.zoo.mutation import (
    Battery,
    Fate,
    counts,
    judged,
    run_mutants,
    score,
    stale,
)
from core.contract.errors import ConfigError
from tests.conformance import mutant_runs

TEXT = '''
LIMIT = 7


def f(x: int | None, y: float, *, deep: bool = False) -> float:
    """Says 3 + 4."""
    z: int | None = x
    if not z or y < 0.5:
        raise ValueError(f"{y + 1} is low")
    total = max(x - y, key=abs)
    total += y * 2.0
    return total


def unused(x):
    return x + 1
'''


def changes(text: str) -> set[tuple[str, str]]:
    return {(mutant.before, mutant.after) for mutant in of_text("module", text)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LIMIT = 7", "LIMIT = (8)"),
        ("LIMIT = 7", "LIMIT = (6)"),
        ("if not z or y < 0.5:", "if True:"),
        ("if not z or y < 0.5:", "if False:"),
        ("if not z or y < 0.5:", "if (not z and y < 0.5):"),
        ("if not z or y < 0.5:", "if (z) or y < 0.5:"),
        ("if not z or y < 0.5:", "if not z or (y <= 0.5):"),
        ("if not z or y < 0.5:", "if not z or y < (0.505):"),
        ("total = max(x - y, key=abs)", "total = (min(x - y, key=abs))"),
        ("total = max(x - y, key=abs)", "total = (max(x - y))"),
        ("total = max(x - y, key=abs)", "total = max((x + y), key=abs)"),
        ("total = max(x - y, key=abs)", "total = max((x), key=abs)"),
        ("total = max(x - y, key=abs)", "total = max((-y), key=abs)"),
        ("total = max(x - y, key=abs)", "pass"),
        ("total += y * 2.0", "total -= y * 2.0"),
        ("total += y * 2.0", "total += (y / 2.0)"),
        ("total += y * 2.0", "total += y * (2.02)"),
        ('raise ValueError(f"{y + 1} is low")', "pass"),
        ("return total", "pass"),
    ],
)
def test_each_rule_makes_its_mutant(before: str, after: str) -> None:
    assert (before, after) in changes(TEXT)


def test_annotations_docstrings_and_texts_of_errors_stay() -> None:
    touched = {before for before, after in changes(TEXT) if after != "pass"}
    assert not {before for before in touched if "Says" in before or "ValueError" in before or "def" in before}
    assert not any("int & None" in after for _, after in changes(TEXT))


def test_every_mutant_is_another_program_and_all_are_the_same_every_time() -> None:
    found = mutants()
    whole = texts()
    assert found == mutants() and len(found) > 500
    assert max(Counter(mutant.key for mutant in found).values()) == 1
    for module in {mutant.module for mutant in found}:
        dumps = [ast.dump(ast.parse(m.text)) for m in found if m.module == module]
        assert len(set(dumps)) == len(dumps) and ast.dump(ast.parse(whole[module])) not in dumps


def test_a_module_that_is_not_mutated_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_module"):
        mutants(["no_such_module"])


def alone(name: str, *arguments: object) -> None:
    """A function of `mutant_runs` in a new process: mutants are forked, and other tests leave threads."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(getattr(mutant_runs, name), *arguments).result()


def test_a_mutant_is_killed_by_a_check_that_is_then_asked_first() -> None:
    alone("kill_one")


def test_a_mutant_that_hangs_ends_or_does_not_load_is_killed() -> None:
    alone("kill_those_that_do_not_answer")


def test_what_no_check_minds_survives_or_is_excused() -> None:
    alone("let_one_survive")


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    alone("write_and_resume", tmp_path)


def test_excuses_are_those_of_mutants_that_there_are() -> None:
    assert stale([], ["attention", "state", "sampler"]) == []
    assert all(one.reason for one in equivalents())


def test_an_excuse_without_a_mutant_or_for_one_that_is_found_is_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = next(one for one in equivalents() if one.module == "state")
    gone = Equivalent("state", "gated_delta", "no such line", "", "none")
    monkeypatch.setattr(mutation, "equivalents", lambda: (real, gone))
    fate = Fate(*real.key[:2], 1, *real.key[2:], "killed", "L2/state_scan/some", "", 0.1)
    messages = stale([fate], ["state"])
    assert len(messages) == 2 and "finds it" in messages[0] and "no such mutant" in messages[1]
    slow = replace(fate, message="no end in 3.0 s")
    assert stale(judged([slow]), ["state"])[0].startswith("there is no such mutant")


def test_shards_are_disjoint_and_what_is_known_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []

    def instead(mutant: Mutant, checks: object, seed: int) -> Fate:
        ran.append(mutant.key)
        return Fate(*mutant.key[:2], mutant.line, *mutant.key[2:], "killed", "x", "", 0.0)

    monkeypatch.setattr(mutation, "try_mutant", instead)
    monkeypatch.setattr(mutation, "battery", lambda module, seed: Battery([], {}))
    one = run_mutants(["state"], shard=(1, 2))
    both = run_mutants(["state"], shard=(2, 2), known=one)
    assert len(both) == len(ran) == len(set(ran)) == len(mutants(["state"]))
    assert [f.key for f in both] == [m.key for m in mutants(["state"])]
    assert len(run_mutants(["state"], limit=3)) == 3


def test_the_committed_report_reaches_the_aim_and_is_of_these_mutants() -> None:
    path = Path(__file__).parents[2] / "docs" / "conformance" / "mutants.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    fates = [Fate(**entry) for entry in table["results"]]
    assert {fate.key for fate in fates} == {mutant.key for mutant in mutants()}
    assert score(fates) >= mutation.AIM and table["counts"] == counts(fates)
    assert judged(fates) == fates and stale(fates, ["attention", "state", "sampler"]) == []
