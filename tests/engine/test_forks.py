"""Choices of one request share blocks, part by copying, and compute what each would alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.types import SampledTokens, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.runner import runner
from core.sampling import reference
from core.sampling.params import SamplingParams

PROMPT = tuple(range(5, 15))
Drawn = dict[tuple[int, int, int], npt.NDArray[np.float32]]


@pytest.mark.parametrize("model", ["llama", "qwen3_5_text"])
@pytest.mark.parametrize("overlap", [1, 2])
def test_each_choice_has_the_logits_of_a_lone_request(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, model: str, overlap: int
) -> None:
    drawn: Drawn = {}

    def sample(logits: npt.NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        for i, row in enumerate(logits):
            key = int(sampling.seed[i]), int(sampling.position[i]), int(sampling.choice[i])
            drawn[key] = row.copy()
        return reference.sample(logits, sampling)

    monkeypatch.setattr(runner, "reference_sample", sample)
    engine = Engine(
        EngineConfig(
            model=tiny_folder(model),
            backend="cpu_reference",
            dtype="float64",
            max_model_len=64,
            max_requests=4,
            max_batch_tokens=32,
            block_size=4,
            overlap=overlap,
        )
    )
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    params = SamplingParams(temperature=1.0, n=3, seed=11, max_tokens=6, ignore_eos=True)
    engine.add("all", PROMPT, params)
    while engine.has_work:
        for event in engine.step():
            if event.token >= 0:
                outputs[event.sequence.choice].append(event.token)
        engine.blocks.check_integrity()
    assert len({tuple(ids) for ids in outputs.values()}) == 3, "choices that do not part test nothing"
    for choice, ids in outputs.items():
        for k in range(len(ids)):
            alone = SamplingParams(temperature=0, seed=99, max_tokens=1, ignore_eos=True)
            engine.add(f"{choice}.{k}", PROMPT + tuple(ids[:k]), alone, salt=f"{choice}.{k}")
            while engine.has_work:
                engine.step()
            position = len(PROMPT) + k
            assert np.array_equal(drawn[11, position, choice], drawn[99, position, 0])
    engine.close()
