"""Fixtures for every folder of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.env import cache_dir
from core.weights.sample import resolve_model


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The sample model's GGUF file, fetched if it is not in the cache; for tests marked `sample`."""
    return resolve_model("sample", cache_dir())
