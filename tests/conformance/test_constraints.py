"""L5 under constraints: a step that breaks a rule, or whose form loses something, is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance.check import Check, Result
from conformance.cli import app
from conformance.constraints import shadow
from conformance.constraints.forms import FORMS
from conformance.constraints.rules import PROFILES, Narrowed, narrow
from conformance.constraints.watch import Watch
from conformance.constraints.wrap import watched
from conformance.levels import engine
from conformance.reading import from_json, validate
from conformance.report import to_badge, to_markdown
from conformance.subject import Subject, Target
from conformance.worker import run_check
from core.contract import derive
from core.contract.spec import BackendSpec, BatchRules, CacheRules, ShapeRules

SEED = 11
EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_backend"


def ran(subject: Subject, name: str) -> Result:
    """One check of L5."""
    checks = {check.id: check for check in engine.checks(subject.spec)}
    return run_check(checks[f"L5/engine/{name}"], subject, SEED)


def under(profile: str, backend: str = "cpu") -> Subject:
    return Subject.of(Target(backend, constraints=profile))


def test_every_profile_has_a_form() -> None:
    assert set(PROFILES) == set(FORMS) == {"mixed", "static", "split", "host-lists", "rectangular"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("check", ["uneven-llama", "prefix-hit-qwen3_5"])
def test_a_right_backend_passes_with_the_tokens_of_the_form(profile: str, check: str) -> None:
    subject = under(profile)
    result = ran(subject, check)
    assert (result.status, result.message) == ("pass", "")
    found = result.metrics
    assert found["constraints"] == profile and subject.watch is not None and not subject.watch.narrowed.kept
    assert (
        int(found["forms_of_real_inputs"]) >= int(found["steps"]) > 20 and not found["forms_of_drawn_inputs"]
    )
    assert 0 < float(found["form_error"]) < 1e-12


@pytest.mark.parametrize("profile", PROFILES)
def test_a_preempted_request_is_met_in_every_profile(profile: str) -> None:
    result = ran(under(profile), "preempted-llama")
    assert result.status == "pass" and int(result.metrics["preemptions"]) >= 1


def test_where_the_host_cannot_read_the_arrays_the_form_gets_drawn_ones() -> None:
    subject = under("split", "pretend")
    result = ran(subject, "late-llama")
    assert result.status == "pass" and not result.metrics["forms_of_real_inputs"]
    assert int(result.metrics["forms_of_drawn_inputs"]) >= 2 * int(result.metrics["steps"]) > 0
    assert subject.watch is not None and subject.watch.narrowed.kept == ("cache.block_sizes",)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_backend_with_rules_of_its_own_obeys_both(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    subject = under(profile, "core_tile.plugin:")
    rules = subject.spec
    assert not rules.batch.mixed and rules.batch.max_prefills == 1 and rules.shapes.kind == "static"
    assert subject.watch is not None and rules.cache.block_sizes == (64,)
    is_kept = "cache.block_sizes" in subject.watch.narrowed.kept
    assert is_kept == (64 not in PROFILES[profile].cache.block_sizes)
    result = ran(subject, "uneven-llama")
    assert (result.status, result.message) == ("pass", "") and result.metrics["forms_of_real_inputs"]


def test_the_tokens_of_a_run_come_from_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    right = shadow.Shadow.found
    monkeypatch.setattr(shadow.Shadow, "found", lambda *args: 0 * right(*args))
    monkeypatch.setattr("conformance.constraints.watch.distance", lambda found, wanted: (0.0, -1))
    result = ran(under("mixed"), "batched-llama")
    assert result.status == "fail" and "in the oracle's logits" in result.message


# What is planted in a form must be found


def longer(field: str, by: int) -> Callable[[Any], Any]:
    """A form with `by` more in each real entry of a field of lengths."""

    def change(form: Any) -> Any:
        old = getattr(form, field)
        if isinstance(old, list):
            return replace(form, **{field: [n + by for n in old]})
        return replace(form, **{field: np.where(old > 0, old + by, old).astype(old.dtype)})

    return change


def first_of(field: str, value: int) -> Callable[[Any], Any]:
    """A form whose first entry is another."""

    def change(form: Any) -> Any:
        old = getattr(form, field).copy()
        old.flat[0] = value
        return replace(form, **{field: old})

    return change


def swapped(field: str) -> Callable[[Any], Any]:
    """A form whose rows are in another order."""
    return lambda form: replace(form, **{field: np.roll(getattr(form, field), 1, axis=0)})


PLANTS = [
    ("mixed", "cumulative_lengths", longer("key_start", -1), "one key too few in the first row"),
    ("mixed", "cumulative_lengths", lambda f: replace(f, max_query=f.max_query - 1), "longest row cut"),
    ("mixed", "cumulative_lengths", lambda f: replace(f, max_keys=f.max_keys - 1), "longest context cut"),
    ("static", "flat_pages", longer("key_lens", 1), "kv_lens one too large"),
    ("static", "flat_pages", longer("key_lens", -1), "kv_lens one too small"),
    ("static", "flat_pages", first_of("pages", 0), "the pad block in place of the first page"),
    (
        "static",
        "flat_pages",
        lambda f: replace(f, distribution=f.distribution[[2, 2, 2]]),
        "prefills as decodes",
    ),
    ("static", "flat_pages", lambda f: replace(f, distribution=f.distribution - 1), "the last row left out"),
    ("split", "flat_blocks", longer("block_usage", -1), "the newest key of a block left out"),
    ("split", "flat_blocks", longer("block_groups", 1), "blocks of another owner"),
    ("split", "flat_blocks", first_of("block_list", 0), "the pad block in place of a block"),
    ("split", "right_padded_rectangle", longer("context_lens", -1), "the context one too short"),
    ("split", "right_padded_rectangle", first_of("slots", 0), "an entry written to the pad block"),
    ("split", "right_padded_rectangle", longer("query_lens", -1), "the last query taken for padding"),
    ("host-lists", "host_lists", longer("key_lens", 1), "one key too many"),
    ("host-lists", "host_lists", longer("query_ends", -1), "rows end one query early"),
    (
        "host-lists",
        "host_lists",
        lambda f: replace(f, key_lens=list(np.array(f.key_lens))),
        "lengths of NumPy's",
    ),
    ("rectangular", "left_padded_rectangle", longer("positions", -1), "the query one column early"),
    ("rectangular", "left_padded_rectangle", longer("left_padding", -1), "a key of the padding"),
    ("rectangular", "left_padded_rectangle", swapped("table"), "tables of other rows"),
    ("rectangular", "right_padded_rectangle", longer("context_lens", 1), "the chunk one column late"),
]


@pytest.mark.parametrize(("profile", "function", "change", "what"), PLANTS, ids=[p[3] for p in PLANTS])
def test_a_planted_error_in_a_form_is_found(
    profile: str, function: str, change: Callable[[Any], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(derive, function)
    monkeypatch.setattr(derive, function, lambda *args: change(right(*args)))
    result = ran(under(profile), "uneven-llama" if function == "left_padded_rectangle" else "chunked-llama")
    assert result.status == "fail", f"{what}: nothing was found"
    assert "its form" in result.message


# A step that breaks a rule must be found

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("batch", {"mixed": False}, "share a step, but steps are not mixed"),
    ("batch", {"max_prefills": 0}, "prefill rows, but 0 are allowed"),
    ("batch", {"prefill_multiple": 7}, "and not its prompt's last, but multiples of 7"),
    ("batch", {"max_tokens": 4}, "tokens, padding included, but 4 are allowed"),
    ("batch", {"max_requests": 1}, "rows, padding included, but 1 are allowed"),
    ("batch", {"max_rows_x_context": 64}, "rows x context, but 64 are allowed"),
    ("batch", {"min_decode_rows": 8}, "but at least 8 are wanted"),
    ("shapes", {"kind": "static"}, "was not compiled before serving"),
    ("shapes", {"token_buckets": (3,)}, "tokens, but (3,) are the sizes there are"),
    ("shapes", {"request_buckets": (3,)}, "rows, but (3,) are the sizes there are"),
    ("shapes", {"width_buckets": (3,)}, "columns of group 0, but (3,) are the sizes there are"),
    ("cache", {"block_sizes": (48,)}, "blocks of 16 tokens"),
    ("cache", {"num_blocks_multiple": 1000}, "multiples of 1000 are wanted"),
    ("cache", {"max_table_bytes": 4}, "but 4 are allowed"),
]


@pytest.mark.parametrize(("part", "rule", "message"), BROKEN, ids=[next(iter(b[1])) for b in BROKEN])
def test_a_step_that_breaks_a_rule_is_found(part: str, rule: dict[str, Any], message: str) -> None:
    subject = under("mixed")
    watch = subject.watch
    assert watch is not None
    spec = watch.narrowed.spec
    # The engine goes on to obey what the backend declares; only the watch knows of the stricter rule.
    watch.narrowed = Narrowed(replace(spec, **{part: replace(getattr(spec, part), **rule)}), ())
    result = ran(subject, "chunked-llama" if part == "batch" else "late-llama")
    assert result.status == "fail" and result.message.startswith("constraints mixed: step ")
    assert any(message in what for what in watch.wrong), watch.wrong


def test_the_cap_on_rows_times_context_binds() -> None:
    plain, profile = Subject.of(Target("cpu")), PROFILES["rectangular"]
    strict = narrow(plain.spec, profile)
    free = replace(strict.spec, batch=replace(strict.spec.batch, max_rows_x_context=None))
    watch = Watch(profile, Narrowed(free, ()))
    subject = Subject(Target("cpu"), watched(plain.handle, watch), watch)
    watch.narrowed = strict
    result = ran(subject, "uneven-llama")
    assert result.status == "fail" and "rows x context, but 384 are allowed" in result.message


def test_a_profile_only_narrows() -> None:
    own = BackendSpec(
        name="x",
        contract=(0, 1),
        summary="",
        framework="numpy",
        batch=BatchRules(mixed=False, prefill_multiple=48, max_tokens=100, min_decode_rows=3),
        shapes=ShapeRules(kind="bucketed", token_buckets=(10, 100)),
        cache=CacheRules(block_sizes=(24, 64), num_blocks_multiple=6),
    )
    found = narrow(own, PROFILES["rectangular"])
    rules = found.spec.batch
    assert (rules.mixed, rules.prefill_multiple, rules.max_tokens) == (False, 192, 100)
    assert (rules.min_decode_rows, rules.max_prefills) == (3, 1) and rules.rectangular_decode
    assert found.spec.shapes == ShapeRules(kind="static", token_buckets=(10, 100))
    assert found.spec.cache == CacheRules(block_sizes=(64,), num_blocks_multiple=12)
    assert found.kept == ("shapes.token_buckets", "shapes.request_buckets")
    mixed = narrow(own, PROFILES["split"])
    assert mixed.spec.cache.block_sizes == (24, 64) and "cache.block_sizes" in mixed.kept
    assert not narrow(own, PROFILES["mixed"]).spec.batch.mixed


# The command


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["run", "--backend", "cpu", "--seed", "5", *args])


def test_a_report_says_that_the_rules_were_emulated(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = invoke("--level", "L5", "--constraints", "host-lists", "--only", "late-llama", "--out", str(out))
    assert found.exit_code == 0, found.output
    text = (out / "report.json").read_text()
    validate(text, "it")
    report = from_json(text, "it")
    assert report.run["constraints"] == "host-lists" and report.run["kept"] == []
    assert report.backend["spec"]["cache"]["block_sizes"] == [128]
    for said in (report.verdict, to_markdown(report), to_badge(report), (out / "report.html").read_text()):
        assert "host-lists" in said and "emulated" in said
    again = CliRunner().invoke(app, ["repro", str(out / "report.json"), report.results[0].id])
    assert again.exit_code == 0 and "constraints = host-lists" in again.output
    assert json.loads((out / "run.json").read_text())["target"]["constraints"] == "host-lists"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--level", "L5", "--constraints", "abacus"), "are not known; choose from mixed"),
        (("--level", "L0..L5", "--constraints", "static"), "L4, L5 are asked for; give --level L5"),
    ],
)
def test_constraints_that_do_not_apply_are_refused(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    found = invoke(*args, "--out", str(tmp_path))
    assert found.exit_code == 2 and message in found.output


def test_a_check_that_runs_no_step_does_not_pass() -> None:
    result = run_check(Check("L5/engine/idle", lambda context: None, ""), under("mixed"), SEED)
    assert result.status == "fail" and "no step's form" in result.message
