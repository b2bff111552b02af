"""`core conformance alarms` runs backends that are right in the dtype that was asked for, and says which."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.check import Check, Result
from conformance.cli import app
from conformance.status import NO_DEVICE, USAGE
from conformance.worker import Setup
from conformance.zoo.faults import LEGAL


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """Setups of the runs, which find nothing."""
    setups: list[Setup] = []

    def passing(checks: Sequence[Check], setup: Setup, take: Callable[[Result], None], jobs: int) -> None:
        setups.append(setup)
        take(Result(checks[0].id, "pass", ""))

    monkeypatch.setattr("conformance.zoo.run.run_all", passing)
    return setups


def alarms(*options: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["alarms", "--level", "L2", *map(str, options)])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["float32"]),
        (("--dtype", "float64"), ["float64"]),
        (("--dtype", "auto"), ["float32"]),
        (("--dtype", "auto", "--backend", "cpu", "--backend", "cpu_reference"), ["float32", "float32"]),
    ],
)
def test_runs_and_results_have_the_dtype_that_was_asked_for(
    options: tuple[str, ...], expected: list[str], ran: list[Setup], tmp_path: Path
) -> None:
    out = tmp_path / "alarms.json"
    code, _ = alarms(*options, "--out", out)
    found = [entry["dtype"] for entry in json.loads(out.read_text())["results"]]
    # The legal changes are of the reference: its own dtypes hold for them.
    assert code == 0 and found == [*expected, *[expected[-1]] * len(LEGAL)]
    assert [setup.target.dtype for setup in ran] == found


def test_a_dtype_of_another_backend_leaves_the_changes_of_the_reference_out(ran: list[Setup]) -> None:
    code, text = alarms("--dtype", "bfloat16", "--backend", "cpu")
    assert code == 0 and "cpu_reference declares float64, float32: without its legal changes" in text
    assert [(s.target.backend, s.target.dtype) for s in ran] == [("cpu", "bfloat16")]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--dtype", "bfloat16"), USAGE, "dtype is 'bfloat16', but backend 'cpu_reference' declares float64"),
        (("--dtype", "float23", "--backend", "cpu"), USAGE, "backend 'cpu' declares float32, bfloat16"),
        (("--backend", "nowhere"), NO_DEVICE, "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    options: tuple[str, ...], status: int, words: str, ran: list[Setup]
) -> None:
    code, text = alarms(*options)
    assert (code, ran) == (status, []) and words in text


def test_a_run_goes_on_only_from_results_of_its_dtype(ran: list[Setup], tmp_path: Path) -> None:
    out = tmp_path / "alarms.json"
    alarms("--out", out)
    table = json.loads(out.read_text())
    for entry in table["results"]:
        # As files were written when there was no choice.
        assert entry.pop("dtype") == "float32"
    out.write_text(json.dumps(table))
    ran.clear()
    alarms("--out", out, "--resume")
    assert not ran
    alarms("--out", out, "--resume", "--dtype", "float64")
    assert len(ran) == 1 + len(LEGAL)


def test_checks_are_run_in_that_dtype(tmp_path: Path) -> None:
    out = tmp_path / "alarms.json"
    code, text = alarms("--level", "L1", "--backend", "cpu", "--dtype", "bfloat16", "--out", out)
    [entry] = json.loads(out.read_text())["results"]
    assert (code, entry["alarms"], entry["dtype"]) == (0, [], "bfloat16"), text
    assert entry["checks"] > 5
