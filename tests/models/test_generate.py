"""Every family through the whole engine: prompts in, tokens out, equal to transformers' greedy ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams
from tests.models.tiny import FAMILIES, reference_logits, tokens

Folder = Callable[[str], Path]

# The engine may choose another token than transformers only where both are nearly as likely.
MARGIN = 0.02
PROMPTS = {"long": tokens(43, seed=1), "short": tokens(9, seed=2)}


def generate(folder: Path, backend: str, dtype: str, count: int) -> dict[str, list[int]]:
    """`count` greedy tokens after each of `PROMPTS`, together."""
    config = EngineConfig(
        model=folder,
        backend=backend,
        dtype=dtype,
        max_model_len=96,
        max_requests=2,
        max_batch_tokens=32,
        block_size=16 if backend == "tpu" else 8,
    )
    engine = Engine(config)
    found: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        engine.add(name, prompt.tolist(), SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
    while engine.has_work:
        for event in engine.step():
            if event.token >= 0:
                found[event.sequence.request.request_id].append(event.token)
    engine.close()
    return found


@pytest.mark.parametrize(
    ("backend", "dtype", "count"), [("cpu", "float32", 8), ("cpu_reference", "float64", 1)]
)
@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_generates_what_transformers_would(
    name: str, backend: str, dtype: str, count: int, tiny_folder: Folder
) -> None:
    folder = tiny_folder(name)
    for request, ids in generate(folder, backend, dtype, count).items():
        prompt = PROMPTS[request]
        logits = reference_logits(folder, np.array([*prompt, *ids]))[len(prompt) - 1 : -1]
        assert len(ids) == count
        lost = logits.max(-1) - logits[np.arange(count), ids]
        assert lost.max() < MARGIN
