"""Runs requests through an engine and keeps the logits that every token was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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

Key = tuple[int, int, int]
"""A draw: seed, position, choice."""


@dataclass
class Record:
    """Logits of every draw, tokens of every request, and the draws that were made more than once."""

    logits: dict[Key, npt.NDArray[np.float32]] = field(default_factory=dict)
    repeats: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = field(default_factory=list)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    preemptions: int = 0
    cached_tokens: int = 0

    def assert_same(self, other: Record) -> None:
        """Every draw that both made had the same logits, bit for bit, and every request the same tokens."""
        shared = self.logits.keys() & other.logits.keys()
        assert shared, "the two runs have no draw in common"
        for key in shared:
            np.testing.assert_array_equal(self.logits[key], other.logits[key], err_msg=f"draw {key}")
        for name in self.tokens.keys() & other.tokens.keys():
            assert self.tokens[name] == other.tokens[name]
        for first, second in (*self.repeats, *other.repeats):
            np.testing.assert_array_equal(first, second)


@dataclass(frozen=True)
class Ask:
    """One request: its name, prompt and parameters. The seed tells its draws apart."""

    name: str
    prompt: tuple[int, ...]
    seed: int
    max_tokens: int = 8
    temperature: float = 0.7


def run(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    waves: Sequence[Sequence[Ask]],
    *,
    backend: str = "cpu_reference",
    dtype: str = "float64",
    max_model_len: int = 128,
    max_requests: int = 8,
    max_batch_tokens: int = 128,
    block_size: int = 8,
    num_blocks: int | None = None,
    prefix_cache: bool = True,
    arrive_after: int = 0,
) -> Record:
    """Run waves of requests, each wave after the one before it is done, or `arrive_after` steps after its
    start.
    """
    record = Record()

    def sample(logits: npt.NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        for i, row in enumerate(logits):
            key = (int(sampling.seed[i]), int(sampling.position[i]), int(sampling.choice[i]))
            if key in record.logits:
                record.repeats.append((record.logits[key], row.copy()))
            record.logits[key] = row.copy()
        return reference.sample(logits, sampling)

    monkeypatch.setattr(runner, "reference_sample", sample)
    engine = Engine(
        EngineConfig(
            model=model,
            backend=backend,
            dtype=dtype,
            max_model_len=max_model_len,
            max_requests=max_requests,
            max_batch_tokens=max_batch_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            prefix_cache=prefix_cache,
        )
    )
    outputs: dict[str, list[int]] = {}

    def step() -> None:
        for event in engine.step():
            if event.token >= 0:
                outputs.setdefault(event.sequence.request.request_id, []).append(event.token)
        engine.blocks.check_integrity()

    for wave in waves:
        for ask in wave:
            engine.add(
                ask.name,
                ask.prompt,
                SamplingParams(
                    temperature=ask.temperature, seed=ask.seed, max_tokens=ask.max_tokens, ignore_eos=True
                ),
            )
        steps = 0
        while engine.has_work and not (arrive_after and steps >= arrive_after):
            step()
            steps += 1
    while engine.has_work:
        step()
    record.tokens = {name: tuple(ids) for name, ids in outputs.items()}
    metrics = engine.metrics()
    record.preemptions, record.cached_tokens = metrics.preemptions, metrics.cached_tokens
    assert metrics.blocks_used == 0
    engine.close()
    return record


def prompt(length: int, seed: int, vocab: int = 256) -> tuple[int, ...]:
    """Random token ids."""
    ids = np.random.default_rng(seed).integers(1, vocab, length)
    return tuple(int(i) for i in ids)
