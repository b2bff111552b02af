"""Level 4 covers every family that core knows, and one real checkpoint."""

from __future__ import annotations

import pytest

from conformance.catalogue import catalogue
from conformance.families import FAMILIES
from conformance.subject import Subject, Target
from conformance.worker import run_check
from core.contract.errors import ConfigError
from core.models import ARCHITECTURES


def test_every_text_model_that_core_knows_has_a_tiny_one() -> None:
    """A model with a tower for images is, to core, the text model of the same family."""
    towers = {"Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM"}
    towers["Qwen3_5MoeForConditionalGeneration"] = "Qwen3_5MoeForCausalLM"
    towers["Gemma3ForConditionalGeneration"] = "Gemma3ForCausalLM"
    towers["Llama4ForConditionalGeneration"] = "Llama4ForCausalLM"
    covered = {architecture for architecture, *_ in FAMILIES.values()}
    assert {towers.get(name, name) for name in ARCHITECTURES} == covered


def test_a_real_checkpoint_that_cannot_be_had_is_no_fault_of_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: object) -> None:
        raise ConfigError("the package index does not answer")

    monkeypatch.setattr("conformance.models.resolve_model", none)
    target = Target("cpu_reference")
    subject = Subject.of(target)
    (check,) = (c for c in catalogue(subject.spec, target, 0) if c.id == "L4/models/sample")
    result = run_check(check, subject, 0)
    assert not check.is_quick
    assert (result.status, result.message) == ("infrastructure", "the package index does not answer")
