"""Fixtures of the engine's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

__all__ = ["tiny_folder"]


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    return write_folder(path, byte_level(VOCAB))
