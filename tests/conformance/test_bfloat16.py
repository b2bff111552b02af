"""The torch backend in bfloat16: inside the bounds by what it declares, and outside with a planted fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.cpu import ops as cpu_ops
from conformance.catalogue import catalogue
from conformance.check import Check, precision_of
from conformance.opcases.base import set_run
from conformance.status import Status
from conformance.subject import Subject, Target
from conformance.tolerance import UNIT_ROUNDOFF
from conformance.worker import run_check

TARGET = Target("cpu", "bfloat16")
SEED = 7


@pytest.fixture
def subject() -> Iterator[Subject]:
    yield Subject.of(TARGET)
    set_run(0, "float32")


@pytest.fixture
def named(subject: Subject) -> Callable[[str], Check]:
    checks = {check.id: check for check in catalogue(subject.spec, TARGET, SEED)}
    return checks.__getitem__


@pytest.mark.parametrize(
    "name",
    [
        "L2/attend/attend-grouped-out-mixed-rule-a",
        "L2/attend/attend-window-out-mixed-poison-huge",
        "L2/attend/attend-sinks-out-mixed-rule-a",
        "L2/linear_add/linear_add-bias-whole-rule-a",
        "L2/linear_add/linear_add-bias-whole-composite",
        "L2/attend_latent/attend_latent-out-mixed-rule-a",
        "L2/state_scan/state_scan-mixed-rule-a",
        "L2/accumulator/hold-1",
    ],
)
def test_the_torch_backend_is_inside(name: str, named: Callable[[str], Check], subject: Subject) -> None:
    result = run_check(named(name), subject, SEED)
    assert result.status == Status.PASS, result.message


def test_weights_that_are_rounded_but_not_declared_so_are_outside(
    named: Callable[[str], Check], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = replace(subject.spec.attention, probability="accumulator")
    monkeypatch.setattr(Subject, "spec", replace(subject.spec, attention=attention))
    result = run_check(named("L2/attend/attend-grouped-out-mixed-rule-a"), subject, SEED)
    assert result.status == Status.FAIL
    assert float(result.metrics["ratio_A"]) > 10


def test_what_is_declared_of_weights_is_what_their_rounding_is_charged_by() -> None:
    spec = Subject.of(TARGET).spec
    assert precision_of(spec, "bfloat16").u_p == UNIT_ROUNDOFF["bfloat16"]
    assert precision_of(spec, "float32").u_p == UNIT_ROUNDOFF["float32"]
    conservative = replace(spec, attention=replace(spec.attention, probability="accumulator"))
    assert precision_of(conservative, "bfloat16").u_p == UNIT_ROUNDOFF["float32"]
    narrow = replace(spec, accumulator="bfloat16")
    assert precision_of(narrow, "bfloat16").u_acc == UNIT_ROUNDOFF["float32"]


@pytest.mark.parametrize("group", [1, 16, 32, 64, 128])
def test_a_bfloat16_accumulator_is_found(
    group: int, named: Callable[[str], Check], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are summed in float32 over 32 of them at most, and then in bfloat16."""

    def narrow(x: torch.Tensor, w: torch.Tensor, bias: Any = None, *, wide: bool = False) -> torch.Tensor:
        total = torch.zeros(*x.shape[:-1], len(w), dtype=torch.bfloat16)
        step = min(group, 32)
        for at in range(0, x.shape[-1], step):
            piece = x[..., at : at + step].float() @ w[:, at : at + step].float().T
            total = (total + piece).to(torch.bfloat16)
        return total.float() if wide else total

    monkeypatch.setattr(
        cpu_ops.CpuOps, "linear", lambda self, x, w, bias=None, *, wide=False: narrow(x, w, bias, wide=wide)
    )
    result = run_check(named(f"L2/accumulator/hold-{group}"), subject, SEED)
    assert result.status == Status.FAIL, result.message
    result = run_check(named("L2/linear/linear-long-whole-rule-a"), subject, SEED)
    assert result.status == Status.FAIL, result.message


class Products:
    """`CpuOps.linear` with a planted fault."""

    @staticmethod
    def a_thousandth_too_large(
        self: Any, x: Any, w: Any, b: Any = None, *, wide: bool = False
    ) -> torch.Tensor:
        return (1.001 * torch.nn.functional.linear(x.float(), w.float(), b.float())).to(torch.bfloat16)

    @staticmethod
    def cut_off(self: Any, x: Any, w: Any, b: Any = None, *, wide: bool = False) -> torch.Tensor:
        y = torch.nn.functional.linear(x.float(), w.float(), b.float())
        return (y.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("fault", ["a_thousandth_too_large", "cut_off"])
def test_a_biased_product_is_found_by_rule_c(
    fault: str, named: Callable[[str], Check], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = named("L2/linear/bulk-linear-rule-c")
    result = run_check(check, subject, SEED)
    assert result.status == Status.PASS, result.message
    monkeypatch.setattr(cpu_ops.CpuOps, "linear", getattr(Products, fault))
    result = run_check(check, subject, SEED)
    assert result.status == Status.FAIL and "biased" in result.message
    assert float(result.metrics["bias_z"]) > 50


@pytest.mark.parametrize("rule", ["rule-b", "rule-c"])
@pytest.mark.parametrize("name", ["attend/bulk-attend-sinks", "state_scan/bulk-state_scan-mixed"])
def test_the_torch_backend_is_as_good_as_its_emulation(
    name: str, rule: str, named: Callable[[str], Check], subject: Subject
) -> None:
    result = run_check(named(f"L2/{name}-{rule}"), subject, SEED)
    assert result.status == Status.PASS, result.message


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5"])
def test_a_tiny_model_is_as_good_as_its_emulation_and_one_with_coarse_scores_is_not(
    family: str, named: Callable[[str], Check], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = named(f"L4/models/{family}")
    result = run_check(check, subject, SEED)
    assert result.status == Status.PASS, result.message
    clean = float(result.metrics["ratio_B_median"])

    def coarse(self: Any, x: torch.Tensor, n: torch.Tensor | None, eps: float) -> torch.Tensor:
        """Rounded to five bits after the norm."""
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        y = y if n is None else y * n
        mantissa, exponent = torch.frexp(y)
        return torch.ldexp((mantissa * 32).round() / 32, exponent).to(x.dtype)

    monkeypatch.setattr(cpu_ops.CpuOps, "norm", coarse)
    result = run_check(check, subject, SEED)
    assert result.status == Status.FAIL, (clean, result.metrics)
    assert clean < 0.75 and float(result.metrics["ratio_B_median"]) > 1
