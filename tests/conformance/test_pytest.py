"""`pytest --pyargs conformance --backend NAME`: statuses of checks as outcomes of tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "misbehaving"


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output, in a process and a folder of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--pyargs",
            "conformance",
            "-p",
            "no:cacheprovider",
            "-rs",
            *arguments,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, sys.path)])},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_backend_that_is_right_passes_and_what_it_lacks_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, text = run(tmp_path, "--backend", "whole:backend", "--level", "L1,L3")
    assert code == 0 and " passed" in text and "29 skipped" in text, text
    assert "not supported: the backend does not declare collectives" in text
    claimed = ("--backend", "whole:backend", "--level", "L3", "--profile", "multi-device")
    code, text = run(tmp_path, *claimed, "-k", "ring/exact-2")
    assert code == 1 and "profile multi-device is claimed, but the backend does not declare" in text


def test_a_crash_fails_its_own_test_and_an_error_says_what_was_found(tmp_path: Path) -> None:
    level = ("--level", "L2", "-k", "attend-grouped-out-whole-rule-a or linear-plain-whole-rule-a")
    code, text = run(tmp_path, "--backend", "crashes:backend", *level)
    assert code == 1 and "crash: the worker ended by signal 6" in text and "(seed " in text, text
    assert "1 failed, 1 passed" in text
    window = ("--level", "L2", "-k", "attend-window-out-mixed-rule-a")
    code, text = run(tmp_path, "--backend", "claims_a_window:backend", *window)
    assert code == 1 and "1 failed" in text and "fail: " in text


def test_what_cannot_be_run_is_a_usage_error(tmp_path: Path) -> None:
    for arguments, words in (
        ((), "no backend is given"),
        (("--backend", "cpu_reference", "--level", "L9"), "level 'L9' is not known"),
        (("--backend", "cpu_reference", "--level", "L7"), "there is no check of L7"),
        (("--backend", "cpu_reference", "--level", "L2", "--constraints", "static"), "give --level L5"),
    ):
        code, text = run(tmp_path, *arguments)
        assert code == 2 and words in text, text
