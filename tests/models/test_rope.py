"""Rotary tables whose frequencies depend on the longest sequence, against transformers' own frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.contract.errors import ConfigError
from core.models.base import rope_table
from core.models.config import rope_config

ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 20000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 20000.0, "factor": 4.0}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def wanted(config: Any, length: int) -> np.ndarray:
    """Table [length, 8] of transformers, for a sequence of `length` tokens."""
    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    angles = np.arange(length)[:, None] * frequencies.double().numpy()
    return np.asarray(factor * np.concatenate([np.cos(angles), np.sin(angles)], -1))


@pytest.mark.parametrize("length", [ORIGINAL // 2, ORIGINAL, ORIGINAL + 1, 4 * ORIGINAL])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_table_is_that_of_the_longest_sequence(kind: str, length: int) -> None:
    if kind == "longrope":
        hf = {"max_position_embeddings": 4 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
        config: Any = Phi3Config(**SIZES, **hf, rope_parameters=dict(LONGROPE), pad_token_id=0)
        found = rope_config({**hf, "rope_parameters": LONGROPE}, 8)
    else:
        hf = {"max_position_embeddings": ORIGINAL}
        config = LlamaConfig(**SIZES, **hf, rope_parameters=dict(DYNAMIC))
        found = rope_config({**hf, "rope_parameters": DYNAMIC}, 8)
    # transformers computes frequencies in float32.
    assert np.abs(rope_table(found, length) - wanted(config, length)).max() < 1e-5 * length
    change = (
        float(np.abs(rope_table(found, length)[:ORIGINAL] - rope_table(found, ORIGINAL)[:length]).max())
        if length > ORIGINAL
        else 0.0
    )
    assert (change > 0.01) == (length > ORIGINAL)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 short and 4 long factors, but 5 of each"):
        rope_config({"max_position_embeddings": 64, "rope_parameters": LONGROPE}, 10)
    lacking = {k: v for k, v in LONGROPE.items() if k != "long_factor"}
    with pytest.raises(ConfigError, match="lacks 'long_factor'"):
        rope_config({"max_position_embeddings": 64, "rope_parameters": lacking}, 8)
