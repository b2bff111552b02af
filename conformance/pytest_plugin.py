"""`pytest --pyargs conformance --backend NAME`: every check of the suite as a test of pytest.

Options are added only where pytest is asked for the suite, so that no other project's options meet them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SUITE = "conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    if SUITE not in sys.argv:
        return
    group = parser.getgroup("conformance of a backend of core")
    group.addoption("--backend", help="a backend's name, or MODULE:OBJECT of one that is not installed")
    group.addoption("--level", default="L0..L5", help="a level, a range or a list (L0..L5)")
    group.addoption("--profile", default="", help="claimed profiles: what they lack fails")
    group.addoption("--dtype", default="auto", help="compute dtype; auto = float32, or the backend's first")
    group.addoption("--constraints", default="", help="rules of other hardware to obey")
    group.addoption("--seed", default="auto", help="auto, or up to 16 hexadecimal digits")
    group.addoption("--full", action="store_true", help="every check, not the quick ones only")
