"""Fixtures of the engine's tests."""

from __future__ import annotations

from tests.models.conftest import tiny_folder

__all__ = ["tiny_folder"]
