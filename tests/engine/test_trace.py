"""CORE_DEBUG=3 prints what every step was given and gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams


def test_each_step_is_printed_without_padding(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CORE_DEBUG", "3")
    engine = Engine(
        EngineConfig(model=tiny_folder("llama"), backend="cpu_reference", dtype="float64", max_model_len=64)
    )
    engine.add("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [event.token for event in engine.step() if event.token >= 0]
    engine.close()
    lines = [
        json.loads(line.removeprefix("core: "))
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("core: {")
    ]
    batches = [line for line in lines if "bucket" in line]
    results = [line for line in lines if "tokens" in line]
    assert [b["token_ids"] for b in batches] == [[5, 6, 7], [0]]
    assert [b["positions"] for b in batches] == [[0, 1, 2], [3]]
    assert [r["tokens"] for r in results] == [[t] for t in tokens]


@pytest.mark.parametrize("level", ["0", "1"])
def test_decisions_are_told_where_the_user_asks_for_them(
    level: str,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CORE_DEBUG", level)
    config = EngineConfig(
        model=tiny_folder("llama"), backend="cpu_reference", dtype="float64", max_model_len=64, block_size=4
    )
    Engine(config).close()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("core: ")]
    if level == "0":
        assert told == []
        return
    assert any(line.startswith("core: backend = cpu_reference: ") for line in told)
    assert "core: dtype = float64: given" in told and "core: block_size = 4: given" in told
    assert any("MiB of float64 weights; KV cache of" in line for line in told)
    assert any("ops that run as composites: none" in line for line in told)
