"""Rules of other hardware: core obeys them, a step that breaks one is noticed, and so is a wrong form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance import constraints, forms
from conformance.check import Context, Failed
from conformance.cli import app
from conformance.constraints import CONSTRAINTS
from conformance.levels import engine
from conformance.subject import Subject, Target
from core.contract import derive
from core.contract.errors import ConfigError, CoreError, DeviceError

SEED = 5
WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cumulative_lengths": (
        "cumulative_lengths",
        lambda form: replace(
            form, key_start=np.maximum(form.key_start - np.arange(len(form.key_start)) // 2, 0)
        ),
    ),
    "flat_pages": ("flat_pages", lambda form: replace(form, pages=np.roll(form.pages, 1))),
    "flat_blocks": (
        "flat_blocks",
        lambda form: replace(form, block_usage=np.maximum(form.block_usage - 1, 1)),
    ),
    "host_lists": ("host_lists", lambda form: replace(form, key_lens=[n + (n > 1) for n in form.key_lens])),
    "left_padded_rectangle": (
        "left_padded_rectangle",
        lambda form: replace(
            form, mask=form.mask & (np.arange(form.mask.shape[1]) != form.positions[:, None])
        ),
    ),
}


def context(backend: str, rules: str = "") -> Context:
    return Context(Subject.of(Target(backend, "float32", constraints=rules)), SEED)


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_model_is_served_from_a_form_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one error in the form gives wrong tokens."""
    subject = context(f"conformance.forms:{form}")
    engine.batched(subject, family="llama")
    name, change = WRONG[form]
    right = getattr(derive, name)
    monkeypatch.setattr(derive, name, lambda *arguments: change(right(*arguments)))
    with pytest.raises((Failed, CoreError)):
        engine.batched(subject, family="llama")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """Rules, by name of constraints, that the steps of an unconstrained engine break."""
    found: dict[str, set[str]] = {name: set() for name in CONSTRAINTS}
    check = constraints.check_step

    def look(batch: Any, spec: Any) -> None:
        for name, rules in CONSTRAINTS.items():
            try:
                check(batch, replace(spec, batch=rules.batch, shapes=rules.shapes))
            except DeviceError as error:
                found[name].add(str(error).partition("(")[2].partition(")")[0])

    monkeypatch.setattr(constraints, "check_step", look)
    yield found


def test_steps_of_an_engine_that_knows_no_rule_break_them(broken: dict[str, set[str]]) -> None:
    engine.staggered(context("cpu_reference", "mixed"), family="llama")
    assert not broken["mixed"] and not broken["host-lists"]
    assert "no step is mixed" in broken["split"] and "no step is mixed" in broken["rectangular"]
    assert {"rows of a decode bucket", "token bucket", "request bucket"} <= broken["rectangular"]
    assert {"token bucket", "request bucket"} <= broken["static"]


@pytest.mark.parametrize("rules", ["split", "rectangular", "static"])
def test_an_engine_obeys_what_is_declared(rules: str) -> None:
    engine.staggered(context("cpu_reference", rules), family="llama")


def test_of_two_rules_the_stricter_holds() -> None:
    spec = Subject.of(Target("conformance.forms:flat_blocks")).spec
    both = CONSTRAINTS["rectangular"].apply(spec)
    assert not both.batch.mixed and both.batch.max_prefills == 1 and both.batch.max_tokens == 128
    assert both.shapes == spec.shapes and both.cache.block_sizes == (128,)
    assert CONSTRAINTS["mixed"].apply(both).batch == both.batch


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="constraints 'fast' are not known; known are mixed, static"):
        context("cpu_reference", "fast")
    done = CliRunner().invoke(app, ["run", "--backend", "cpu_reference", "--constraints", "fast"])
    assert done.exit_code == 2 and "are not known" in done.output
