"""One table names the architectures: the modules, the docs and the tiny models agree with it."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from core.models import ARCHITECTURES
from tests.models.tiny import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_docs_list_every_architecture_with_its_file() -> None:
    rows = re.findall(
        r"^\| ([^|]*(?:ForCausalLM|ForConditionalGeneration)[^|]*) \| `(\w+)\.py` \|", PAGE.read_text(), re.M
    )
    listed = {name: module for names, module in rows for name in re.findall(r"\w+For\w+", names)}
    assert listed == ARCHITECTURES


def test_a_module_names_the_architectures_that_lead_to_it() -> None:
    for module in set(ARCHITECTURES.values()):
        names = {name for name, found in ARCHITECTURES.items() if found == module}
        assert set(import_module(f"core.models.{module}").ARCHITECTURES) == names


def test_every_module_has_a_tiny_model() -> None:
    assert {ARCHITECTURES[f.architecture] for f in FAMILIES} == set(ARCHITECTURES.values())
