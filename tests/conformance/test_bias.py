"""Rules B and C: correct arithmetic passes, and small faults that rule A may overlook do not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance.bias import LIMIT, Bias, allowance
from conformance.check import Check, Context
from conformance.opcases import bulk
from conformance.opcases.base import set_run
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.tolerance import KAPPA, Precision, compared
from conformance.worker import run_check

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sensitivity.py"
BF16 = Precision(out="bfloat16", probability="bfloat16")


@cache
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sensitivity", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sensitivity"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def plain_run() -> Iterator[None]:
    yield
    set_run(0, "float32")


@cache
def judge(name: str) -> Any:
    return tool().Judge(name, 5)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("name", ["linear", "norm", "glu-silu", "attend-whole", "experts"])
def test_correct_arithmetic_is_within_rules_b_and_c(name: str) -> None:
    figures = judge(name).figures(tool().EmulatedOps)
    assert figures.found_by == "none", figures


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, fault in tool().FAULTS if "0.1 %" in fault or "cut off" in fault]
    + [(name, fault) for name, fault in tool().FAULTS if "1.001" in fault],
)
def test_a_thousandth_a_cut_and_a_dropped_eps_are_found_by_rule_c(name: str, fault: str) -> None:
    figures = judge(name).figures(tool().FAULTS[name, fault])
    assert figures.z > 2 * LIMIT, figures


def test_rule_c_finds_what_rule_a_does_not() -> None:
    figures = judge("attend-whole").figures(tool().scaled(1.001))
    assert figures.a <= 1 and figures.found_by == "C"


@pytest.mark.parametrize(
    ("name", "fault"),
    [("linear", "bfloat16 sums of 32 products"), ("attend-whole", "scores in bfloat16")],
)
def test_a_narrow_accumulator_is_found_by_rule_b(name: str, fault: str) -> None:
    figures = judge(name).figures(tool().FAULTS[name, fault])
    assert "B" in figures.found_by, figures


def test_clean_tensors_raise_no_alarm() -> None:
    alarms, largest, count = tool().false_alarms(300)
    assert count == 300 and not alarms
    assert 1 < largest < LIMIT


def test_the_slope_and_the_mean_are_those_of_the_error() -> None:
    y = np.random.default_rng(1).normal(size=(50, 40))
    bias = Bias.of(1.25 * y + 0.5, y)
    assert bias.slope == pytest.approx(0.25)
    assert bias.mean == pytest.approx(0.5 + 0.25 * y.mean())
    assert bias.z(0.0) > 1e6
    assert Bias.of(y, y).z(0.0) == 0
    assert Bias.of(np.where(y > 2, np.nan, y), y).z(1.0) == np.inf


def test_what_a_row_has_in_common_is_no_bias() -> None:
    """Taken for independent, elements that share their row's error would raise the alarm."""
    rng = np.random.default_rng(4)
    y = 1 + 0.1 * rng.normal(size=(200, 500))
    found = y * (1 + 1e-3 * rng.normal(size=(200, 1)))
    assert Bias.of(found, y).z(0.0) < LIMIT
    assert Bias.of(found.reshape(-1, 1), y.reshape(-1, 1)).z(0.0) > LIMIT


def test_a_bias_of_the_size_that_is_allowed_is_no_alarm() -> None:
    y = np.random.default_rng(2).normal(size=(300, 400))
    f32 = Precision(out="float32")
    allowed = allowance(f32, 1, functions=True)
    assert allowed == pytest.approx(9 * 2.0**-24, rel=1e-5)
    assert Bias.of(y * (1 + 0.9 * allowed), y).z(allowed) == 0
    assert Bias.of(y * (1 + 1.1 * allowed), y).z(allowed) > LIMIT
    assert allowance(BF16, 2, functions=False) == pytest.approx(2 * 2.0**-16, rel=1e-2)


def test_rounding_is_biased_by_less_than_its_square() -> None:
    """For values over several binades and within one."""
    rng = np.random.default_rng(3)
    for y in (
        rng.normal(size=(1000, 1000)),
        1 + rng.random((1000, 1000)),
        rng.exponential(size=(1000, 1000)),
    ):
        bias = Bias.of(rounded(y), y)
        allowed = allowance(BF16, 1, functions=False)
        assert abs(bias.slope) < allowed + 3 * bias.slope_se
        assert abs(bias.mean) < allowed * bias.size + 3 * bias.mean_se


def test_rule_b_takes_the_worst_of_its_emulations() -> None:
    y = np.random.default_rng(6).normal(size=(100, 100))
    small, large = y + 1e-5 * np.sign(y), y + 3e-5 * np.sign(y)
    found = y + 5e-5 * np.sign(y)
    assert compared(found, y, [small], "float32").largest > 1
    ratio = compared(found, y, [small, large], "float32")
    assert 0.5 < ratio.largest < 1 and ratio.mean == pytest.approx(5 / 3 / 1.25, rel=1e-3)
    assert compared(np.full(y.shape, np.nan), y, [large], "float32").largest == np.inf


def test_rule_b_allows_one_rounding_where_the_emulation_is_exact() -> None:
    y = np.random.default_rng(7).normal(size=(100, 100))
    ratio = compared(rounded(y), y, [y], "bfloat16")
    assert ratio.largest <= 1 and ratio.mean == pytest.approx(0.8, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "status"),
    [(1.0, Status.PASS), (1.05, Status.QUALITY_WARNING), (1.45, Status.QUALITY_WARNING), (1.6, Status.FAIL)],
)
def test_a_result_somewhat_worse_than_the_emulation_is_a_quality_warning(
    times: float, status: Status
) -> None:
    y = np.random.default_rng(8).normal(size=(100, 100))
    emulated, found = y + 0.1, y.copy()
    found[3, 4] += times * 0.999 * KAPPA * 0.1  # one element alone, so the RMS error stays small

    def run(context: Context) -> None:
        context.as_good(found, y, [emulated], "a tensor")

    check = Check("L2/bulk/made", run, "made up")
    result = run_check(check, Subject.of(Target("cpu_reference")), 1)
    assert result.status == status, (result.message, result.metrics)
    assert {"ratio_B", "ratio_B_rms"} <= set(result.metrics)


def test_bulk_cases_have_as_many_results_as_rule_c_asks_for() -> None:
    set_run(0, "bfloat16")
    ops = set()
    for case in bulk.cases():
        if case.schedule == "whole":
            assert tool().Judge(case.name, 0).exact.size >= bulk.LEAST, case.name
        ops.add(case.op)
    assert {"linear", "norm", "glu", "attend", "attend_latent", "experts", "route", "state_scan"} <= ops


def test_the_page_shows_what_each_fault_gives() -> None:
    page = tool().PAGE.read_text(encoding="utf-8")
    table = page.split(tool().BEGIN)[1].split(tool().END)[0]
    assert [
        tuple(cell.strip() for cell in line.split("|")[1:3])
        for line in table.splitlines()
        if line.startswith("| ") and not line.startswith("| case")
    ] == list(tool().FAULTS)
