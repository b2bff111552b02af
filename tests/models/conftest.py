"""Tiny models on disk, written once for a whole test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny import make_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family in `tiny.FAMILIES`, by name. Read-only: every test of the session shares it."""
    root = tmp_path_factory.mktemp("tiny")
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = make_folder(name, root / name)
        return folders[name]

    return folder
