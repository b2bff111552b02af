"""Backends that are wrong each in their own way: the run ends, and says what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "misbehaving"
MAIN = "from core.cli.app import main; main()"


@dataclass(frozen=True)
class End:
    """How a run ended: exit status, what was printed, and the report (None where there is none)."""

    code: int
    text: str
    report: dict[str, Any] | None

    def of(self, check: str) -> dict[str, Any]:
        """What became of one check."""
        assert self.report is not None, self.text
        return next(r for r in self.report["results"] if r["id"] == check)


def run(module: str, out: Path, *arguments: str) -> End:
    """`core conformance run` in a process of its own."""
    command = [sys.executable, "-c", MAIN, "conformance", "run", "--backend", f"{module}:backend"]
    done = subprocess.run(
        [*command, "--out", str(out), "--seed", "7", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, sys.path)])},
    )
    file = out / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return End(done.returncode, done.stdout + done.stderr, report)


WINDOW = ("--level", "L2", "--only", "L2/attend/attend-window-out-mixed-rule-a")
REGISTRATION = ("--level", "L0", "--only", "registration")


def test_one_that_is_right_conforms(tmp_path: Path) -> None:
    end = run("whole", tmp_path, "--level", "L0")
    assert end.code == 0, end.text


def test_a_feature_that_is_claimed_and_lacking_is_a_failure(tmp_path: Path) -> None:
    end = run("claims_a_window", tmp_path, *WINDOW)
    assert end.code == 1, end.text
    found = end.of(WINDOW[-1])
    assert found["status"] == "fail" and "is wanted by rule A" in found["message"]
    assert found["message"] in end.text


def test_a_feature_that_is_claimed_and_refused_is_a_failure(tmp_path: Path) -> None:
    end = run("refuses_a_window", tmp_path, *WINDOW)
    assert end.code == 1, end.text
    found = end.of(WINDOW[-1])
    assert found["status"] == "fail"
    assert found["message"].startswith("the backend refuses what it declares: window is 1")


def test_a_feature_that_is_not_claimed_and_taken_is_a_failure(tmp_path: Path) -> None:
    end = run("takes_a_window", tmp_path, "--level", "L0", "--only", "refusals/.*window")
    assert end.code == 1, end.text
    bad = [r for r in end.report["results"] if r["status"] == "fail"] if end.report else []
    assert bad and all("UnsupportedError is wanted" in r["message"] for r in bad)


def test_one_of_another_contract_is_not_loaded(tmp_path: Path) -> None:
    end = run("other_contract", tmp_path, *REGISTRATION)
    assert end.code == 1
    assert end.of("L0/registration/loads")["status"] == "fail" and "was built for contract (7, 0)" in end.text


def test_one_that_imports_internals_is_told_of_each(tmp_path: Path) -> None:
    end = run("imports_internals", tmp_path, *REGISTRATION)
    found = end.of("L0/registration/imports-the-contract-alone")
    assert end.code == 1 and found["status"] == "fail"
    assert "imports_internals.py:7 imports core.scheduler" in found["message"]


@pytest.mark.parametrize(
    ("module", "status", "words"),
    [
        ("crashes", "crash", "signal 6"),
        ("exits", "crash", "exit status 0"),
        ("hangs", "timeout", "no answer in 3 s"),
    ],
)
def test_a_kernel_that_ends_its_process_costs_one_check(
    module: str, status: str, words: str, tmp_path: Path
) -> None:
    norm = "L2/norm/norm-.*rule-a"
    end = run(module, tmp_path, "--level", "L2", "--only", f"{WINDOW[-1]}|{norm}", "--time-factor", "0.05")
    assert end.code == 6, end.text
    found = end.of(WINDOW[-1])
    assert found["status"] == status and words in found["message"]
    assert end.report is not None
    others = [r["status"] for r in end.report["results"] if r["id"] != WINDOW[-1]]
    assert others and set(others) == {"pass"}


def test_what_a_library_prints_spoils_nothing(tmp_path: Path) -> None:
    end = run("talks", tmp_path, *REGISTRATION)
    assert end.code == 0, end.text
    end = run("talks", tmp_path, *WINDOW)
    assert end.code == 0 and end.of(WINDOW[-1])["status"] == "pass"


def test_one_that_ends_its_importer_is_refused(tmp_path: Path) -> None:
    end = run("exits_at_import", tmp_path, *REGISTRATION)
    assert end.code == 1
    assert (
        "exits_at_import" in end.of("L0/registration/loads")["message"] and "no licence was found" in end.text
    )
