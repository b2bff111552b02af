"""Logits of a model through the whole engine, with the tokens given: chunked prompt, then one decode step per
token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.types import SampledTokens, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.runner import runner
from core.sampling.params import SamplingParams

Float64 = npt.NDArray[np.float64]

CHUNK, BLOCK = 16, 8


def forced_logits(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    ids: npt.NDArray[np.int32],
    prompt: int,
    backend: str,
    dtype: str,
) -> Float64:
    """Logits after each of the tokens [prompt - 1, len(ids) - 1): float64 [len(ids) - prompt, V].

    A second request runs beside it, so that rows, blocks and slots are not all the first.
    """
    length = len(ids)
    found: dict[int, npt.NDArray[np.float32]] = {}

    def sample(logits: npt.NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        tokens = np.ones(len(logits), np.int32)
        for i, row in enumerate(logits):
            position = int(sampling.position[i])
            if int(sampling.seed[i]) == 1:
                found[position] = row.copy()
                tokens[i] = ids[position]
        return SampledTokens(tokens)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "reference_sample", sample)
        engine = Engine(
            EngineConfig(
                model=model,
                backend=backend,
                dtype=dtype,
                max_model_len=length + 8,
                max_requests=2,
                max_batch_tokens=CHUNK,
                block_size=BLOCK,
            )
        )
        other = SamplingParams(temperature=1.0, seed=2, max_tokens=8, ignore_eos=True)
        engine.add("other", ids[5 : 5 + BLOCK + 3].tolist(), other)
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=length - prompt, ignore_eos=True)
        engine.add("forced", ids[:prompt].tolist(), params)
        while engine.has_work:
            engine.step()
        engine.close()
    return np.stack([found[p] for p in range(prompt, length)]).astype(np.float64)
