"""Rows of logits that are no numbers: the checks pass where backends are right, and find what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.catalogue import catalogue_of, select
from conformance.kit.new_backend import write_backend
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import Edit, edited, load, sources
from core.plugins import Plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_backend"
ALONE, AFTER = "L2/sampling/not-a-number-", "L2/sampling/after-not-a-number-"
SEED = 3


def failed(subject: Subject) -> dict[str, str]:
    """Messages of the checks that do not pass."""
    checks = select(catalogue_of(subject, SEED), (2,), pattern=f"{ALONE}|{AFTER}")
    assert len(checks) == 15 and not any(check.is_waivable for check in checks)
    results = [run_check(check, subject, SEED) for check in checks]
    return {result.id: result.message for result in results if result.status != "pass"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu_reference", "float32"),
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        ("tpu", "float32"),
        ("core_tile.plugin:", "float32"),
    ],
)
def test_backends_draw_nothing_for_such_a_row_and_spoil_no_other(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    assert failed(Subject.of(Target(name, dtype))) == {}


def test_a_new_backend_begins_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_backend("nan_chip", tmp_path / "new")
    monkeypatch.syspath_prepend(tmp_path / "new")
    assert failed(Subject.of(Target("core_nan_chip.plugin:"))) == {}


SAMPLED = "sampled = self._sampler(logits, sampling)"
LAST = "state.last[batch.sample_slots[:n]] = np.maximum(sampled.tokens, 0)"
DRAWN_ALONE = "state.last[batch.sample_slots[:n][drawn]] = sampled.tokens[drawn]"


def after(line: str) -> list[Edit]:
    """A line more after the draw."""
    return [("compiler", SAMPLED, f"{SAMPLED}\n        {line}")]


def before(line: str) -> list[Edit]:
    """A line more before the draw."""
    return [("compiler", SAMPLED, f"{line}\n        {SAMPLED}")]


PLANTED: dict[str, tuple[list[Edit], str, str]] = {
    "id 0 is drawn": (
        after("sampled.tokens[sampled.tokens < 0] = 0"),
        ALONE + "plain-greedy",
        "tokens of rows without a finite logit at (0,) is np.int32(0), but exactly np.int64(-1)",
    ),
    "the whole batch draws nothing": (
        after("sampled.tokens[:] = -1 if (sampled.tokens < 0).any() else sampled.tokens"),
        ALONE + "plain-mixed",
        "tokens at (0,) is np.int32(-1)",
    ),
    "a neighbour draws nothing": (
        after("sampled.tokens[1:][sampled.tokens[:-1] < 0] = -1"),
        ALONE + "plain-drawn",
        "tokens at (2,) is np.int32(-1)",
    ),
    "NaN counts as the smallest": (
        before("logits = np.where(np.isnan(logits), np.float32(-1e30), logits)"),
        ALONE + "cut-drawn",
        "tokens of rows without a finite logit at (0,)",
    ),
    "only a row of NaN alone draws nothing": (
        before(
            "logits = np.where(np.isnan(logits).all(-1, keepdims=True), logits, "
            "np.clip(np.nan_to_num(logits), -1e30, 1e30))"
        ),
        ALONE + "plain-greedy",
        "tokens of rows without a finite logit at (0,)",
    ),
    "a row of NaN alone draws": (
        before("logits = np.where(np.isnan(logits).all(-1, keepdims=True), np.float32(0), logits)"),
        ALONE + "plain-mixed",
        "tokens of rows without a finite logit at (3,)",
    ),
    "the next step is fed -1": (
        [("compiler", LAST, LAST.replace("np.maximum(sampled.tokens, 0)", "sampled.tokens"))],
        AFTER + "greedy",
        "tokens of the next step, fed from `last` at (1,)",
    ),
    "the next step is fed what was there before": (
        [("compiler", LAST, f"drawn = sampled.tokens >= 0\n        {DRAWN_ALONE}")],
        AFTER + "mixed",
        "tokens of the next step, fed from `last` at (1,) is np.int32(12)",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_sampler_that_is_wrong_is_found(case: str) -> None:
    edits, check, words = PLANTED[case]
    clone = load(edited(sources(), edits), "conformance_no_numbers")
    handle = Plugins(disabled=frozenset()).register_backend(clone, "cpu_reference")
    found = failed(Subject(Target("cpu_reference"), handle))
    assert words in found.get(check, ""), found


def test_the_clone_that_faults_are_planted_in_is_right() -> None:
    clone = load(sources(), "conformance_no_numbers")
    handle = Plugins(disabled=frozenset()).register_backend(clone, "cpu_reference")
    assert failed(Subject(Target("cpu_reference"), handle)) == {}
