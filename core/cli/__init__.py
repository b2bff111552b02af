"""The command line: `core COMMAND ...`."""

from __future__ import annotations

from core.cli.app import main

__all__ = ["main"]
