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
