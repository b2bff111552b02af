"""Greedy tokens of the sample model agree with transformers wherever the reference is decided.

The margin rule: where the reference's two largest logits, given the same tokens before, are at least 0.02
apart, ours is the
larger. The reference is transformers in float32 with the same GGUF's weights. It reads our own tokens, so
every position is
compared, and up to the first undecided one it would have written them itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core import LLM, SamplingParams
from core.env import cache_dir
from core.weights.sample import resolve_model
from tests.engine.prompts import PROMPTS

pytestmark = pytest.mark.sample

MARGIN = 0.02


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    path: Path = resolve_model("sample", cache_dir())
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    yield model.eval()


def reference_logits(model: Any, ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 [len(ids), V]."""
    import torch

    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


@cache
def generated(
    backend: str, count: int, length: int, dtype: str
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(prompt ids, output ids) of the first `count` prompts, all generated at once."""
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    with LLM(
        "sample", backend=backend, dtype=dtype, max_model_len=256, max_requests=64, show_progress=False
    ) as llm:
        outputs = llm.generate(list(PROMPTS[:count]), params)
    return tuple((o.prompt_token_ids, o.outputs[0].token_ids) for o in outputs)


def check_margins(
    model: Any, results: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
) -> tuple[int, int]:
    """Assert the margin rule; (decided positions, all positions)."""
    decided = total = 0
    for prompt, output in results:
        logits = reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
        top = np.partition(logits, -2, axis=-1)[:, -2:]
        is_decided = top[:, 1] - top[:, 0] >= MARGIN
        best = logits.argmax(-1)
        wrong = np.flatnonzero(is_decided & (best != np.array(output)))
        assert not len(wrong), f"position {wrong[0]} of {output}: the reference has {best[wrong[0]]}"
        chosen = logits[np.arange(len(output)), list(output)]
        assert (top[:, 1] - chosen < MARGIN).all()
        decided += int(is_decided.sum())
        total += len(output)
    return decided, total


@pytest.mark.parametrize(
    ("backend", "dtype", "count", "length"),
    [
        ("cpu", "float32", 12, 24),
        ("tpu", "float32", 8, 12),
        pytest.param("cpu", "float32", 50, 64, marks=pytest.mark.slow),
        pytest.param("tpu", "float32", 50, 64, marks=pytest.mark.slow),
        pytest.param("cpu_reference", "float64", 5, 16, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_match_transformers_where_decided(
    reference: Any, backend: str, dtype: str, count: int, length: int
) -> None:
    results = generated(backend, count, length, dtype)
    assert len(results) == count
    assert all(len(output) == length for _, output in results)
    decided, total = check_margins(reference, results)
    assert decided >= 0.95 * total
