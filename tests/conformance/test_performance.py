"""L7: a floor holds, or fails with figures; a fast wrong result fails; floors are those of the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conformance.bench import Bench
from conformance.catalogue import catalogue_of
from conformance.check import Context, Failed
from conformance.levels import performance
from conformance.levels.performance import MEASURES, hold_floor
from conformance.subject import Subject, Target
from core.contract.errors import ConfigError
from core.contract.requests import ConformanceExtras, Floor


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    monkeypatch.setattr(performance, "LONG_ENOUGH_S", 0.0)
    yield Context(Subject.of(Target("cpu_reference", "float32")), 7)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_floor_is_reached_or_missed_with_the_figures(context: Context, measure: str) -> None:
    hold_floor(context, Floor(measure=measure, value=1.0))
    speed = context.metrics["speed"]
    assert isinstance(speed, float) and speed > 1.0
    with pytest.raises(Failed, match=f"{measure}: .* but the backend promises 1e\\+18 on"):
        hold_floor(context, Floor(measure=measure, value=1e18))


@pytest.mark.parametrize("measure", ["products", "decode_attention", "prefill_attention"])
def test_a_result_that_is_given_again_is_no_speed(
    context: Context, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, held = Bench.step, {}

    def step(self: Bench, rows: Any) -> dict[tuple[int, int], Any]:
        found = own(self, rows)
        first = held.setdefault(id(self), next(iter(found.values())))
        return dict.fromkeys(found, first)

    monkeypatch.setattr(Bench, "step", step)
    with pytest.raises(Failed, match="is wanted by rule A"):
        hold_floor(context, Floor(measure=measure, value=1.0))


def test_blocks_that_were_not_copied_are_no_speed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(context.subject, "float32", performance.World((1,)), {}, performance._no_step)
    monkeypatch.setattr(type(bench.allocator), "copy_blocks", lambda self, state, group, src, dst: state)
    with pytest.raises(Failed, match="timed copies"):
        hold_floor(context, Floor(measure="block_copies", value=1.0))


def test_a_short_answer_is_no_speed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    own = performance.play
    monkeypatch.setattr(
        performance, "play", lambda *args: {name: tokens[1:] for name, tokens in own(*args).items()}
    )
    with pytest.raises(Failed, match="gives 63 tokens"):
        hold_floor(context, Floor(measure="engine", value=1.0))


def _floors(*floors: Floor) -> list[str]:
    subject = Subject.of(Target("cpu_reference", "float32"))
    subject.__dict__["extras"] = ConformanceExtras(floors=floors)
    return [check.id for check in catalogue_of(subject, 1) if check.level == 7]


def test_floors_are_those_of_the_device_and_the_dtype() -> None:
    name = Subject.of(Target("cpu_reference")).info.name
    assert _floors() == []
    assert _floors(Floor(measure="engine", value=1, device="another chip")) == []
    assert _floors(Floor(measure="engine", value=1, dtype="bfloat16")) == []
    assert _floors(Floor(measure="engine", value=1, device=f"{name[:4]}*")) == ["L7/floor/engine"]


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        (Floor(measure="product", value=1), "nearest is 'products'"),
        (Floor(measure="products", value=0), "a number above 0 is wanted"),
        (Floor(measure="products", value=np.nan), "a number above 0 is wanted"),
    ],
)
def test_a_floor_without_sense_is_refused(floor: Floor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _floors(floor)
