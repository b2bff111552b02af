"""Commands end with status 0, or with one sentence and status 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_test_plugins.null import SPEC, NullBackend
from safetensors.numpy import load_file, save_file

from backends.cpu_reference import plugin as oracle
from core.cli.doctor import examine
from core.contract.hookspecs import hookimpl
from core.contract.spec import BatchRules, ShapeRules
from core.plugins import Plugins
from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

__all__ = ["tiny_folder"]

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
        *("generate", "sample", "--backend", "cpu", "--prompt", "The capital of France is"),
        *("--max-tokens", "4", "--temperature", "0"),
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.sample
def test_demo_shows_eight_answers_and_exits_0() -> None:
    done = core("demo", "--max-tokens", "6", "--backend", "cpu", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "48 tokens in" in done.stdout
    assert "KV blocks" in done.stdout


def test_doctor_asks_a_backend_only_for_shapes_that_it_declares_and_outlives_a_probe_that_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Strict:
        """The oracle under another name, with few static shapes."""

        @hookimpl
        def core_backend_spec(self, request: Any) -> Any:
            shapes = ShapeRules(kind="static", request_buckets=(4,), width_buckets=(8,))
            return replace(oracle.SPEC, name="strict", shapes=shapes, batch=BatchRules(min_decode_rows=3))

        @hookimpl
        def core_compile(self, request: Any) -> Any:
            assert (request.bucket.requests, request.bucket.widths) == (4, (8,))
            return oracle.core_compile(request)

        core_probe = staticmethod(oracle.core_probe)
        core_open_device = staticmethod(oracle.core_open_device)
        core_memory_allocator = staticmethod(oracle.core_memory_allocator)
        core_ops = staticmethod(oracle.core_ops)

    class Broken(NullBackend):
        """Its probe raises."""

        @hookimpl
        def core_probe(self, request: Any) -> Any:
            raise RuntimeError("the driver is gone")

    plugins = Plugins(disabled=frozenset())
    plugins.register_backend(Strict(), "strict")
    plugins.register_backend(Broken(replace(SPEC, name="broken")), "broken")
    monkeypatch.setattr(plugins, "load", lambda: None)
    monkeypatch.setattr("core.cli.doctor.Plugins", lambda: plugins)
    found = {check.backend: check for check in examine()}
    assert found["strict"].status == "PASS", found["strict"].detail
    assert found["broken"].status == "FAIL" and "the driver is gone" in found["broken"].detail


@pytest.fixture
def served(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model with a tokenizer and no chat template."""
    path = tmp_path / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    return write_folder(path, byte_level(VOCAB))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "x" * 3000), "tokens; it must have 1 to 511"),
        (("--prompt", "fine", "--prompt", ""), "the prompt has 0 tokens"),
        (("--prompt", "x", "--chat"), "has no chat template"),
    ],
)
def test_a_wrong_prompt_is_refused_before_weights_are_read(
    served: Path, arguments: tuple[str, ...], words: str
) -> None:
    # Values that loading would stumble over.
    tensors = load_file(served / "model.safetensors")
    save_file({k: v * np.nan for k, v in tensors.items()}, served / "model.safetensors")
    done = core("generate", str(served), "--backend", "cpu_reference", "--dtype", "float32", *arguments)
    assert done.returncode == 1 and words in done.stderr and "NaN" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_text_of_one_prompt_is_printed_as_it_grows_and_an_interrupt_keeps_it(served: Path) -> None:
    # A test run in the background ignores interrupts, and so would this process.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from core.cli import main; main()"
    arguments = ["generate", str(served), "--backend", "cpu_reference", "--dtype", "float32"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-c",
            code,
            *arguments,
            "--prompt",
            "the quick",
            "--temperature",
            "0",
            "--max-tokens",
            "480",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "CORE_DISABLE_PLUGINS": BROKEN},
    )
    assert process.stdout is not None
    begun = process.stdout.read(8)
    assert process.poll() is None, "the text came only when all of it was there"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert len(begun) == 8 and rest.endswith(b"\n")
    assert process.returncode == 130 and b"Traceback" not in errors, errors.decode()


def test_the_texts_of_several_prompts_come_in_their_order(served: Path) -> None:
    found = core(
        *("generate", str(served), "--backend", "cpu_reference", "--dtype", "float32"),
        *("--prompt", "first one", "--prompt", "x", "--temperature", "0", "--max-tokens", "5"),
    )
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stdout.splitlines() if line.startswith("---")] == [
        "--- first one",
        "--- x",
    ]
