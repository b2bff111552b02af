"""Commands end with status 0, or with one sentence and status 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BROKEN = "null,older_contract,newer_contract,misspelled_hook,broken_import,pretend"


def core(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from core.cli import main; main()"
    env = {**os.environ, "CORE_DISABLE_PLUGINS": BROKEN, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "no-such-model", "--prompt", "x"), "no-such-model"),
        (("generate", "no-such-model", "--prompt", "x", "--temperature", "-1"), "temperature is -1.0"),
    ],
)
def test_a_user_error_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = core(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback() -> None:
    done = core("--debug", "generate", "no-such-model", "--prompt", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_doctor_passes_every_backend_and_speaks_json() -> None:
    done = core("doctor", "--json")
    checks = json.loads(done.stdout)
    assert {c["backend"]: c["status"] for c in checks} == dict.fromkeys(
        ("cpu", "cpu_reference", "tpu"), "PASS"
    )
    assert done.returncode == 0


def test_backends_lists_what_is_installed() -> None:
    done = core("backends")
    assert done.returncode == 0
    for name in ("cpu", "cpu_reference", "tpu"):
        assert name in done.stdout


@pytest.mark.sample
def test_generate_prints_the_text() -> None:
    done = core(
        "generate", "sample", "--backend", "cpu", "--prompt", "The capital of France is", "--max-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.sample
def test_demo_shows_eight_answers_and_exits_0() -> None:
    done = core("demo", "--max-tokens", "6", "--backend", "cpu", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "48 tokens in" in done.stdout
    assert "KV blocks" in done.stdout
