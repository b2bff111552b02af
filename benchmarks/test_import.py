"""How long `import core` takes in a fresh interpreter, beside an interpreter that imports nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("code", ["pass", "import core", "from core import LLM, SamplingParams"])
def test_import(benchmark: BenchmarkFixture, code: str) -> None:
    benchmark.pedantic(
        subprocess.run, args=([sys.executable, "-c", code],), kwargs={"check": True}, rounds=10
    )
