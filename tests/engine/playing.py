"""Engines of a tiny model, and what they gave to requests that came together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams

PROMPTS = {"a": tuple(range(20, 29)), "b": tuple(range(40, 46)), "c": (9, 8, 9, 8), "d": tuple(range(60, 75))}


def open_engine(folder: Path, backend: str, depth: int, blocks: int = 64, **options: Any) -> Engine:
    size = 8 if backend == "tpu" else 4
    return Engine(
        EngineConfig(
            model=folder,
            backend=backend,
            dtype="float32",
            max_model_len=48,
            max_requests=4,
            max_batch_tokens=16,
            block_size=size,
            num_blocks=blocks * 4 // size,
            overlap=depth,
            **options,
        )
    )


def play(engine: Engine, params: dict[str, SamplingParams], aborts: dict[int, str] | None = None) -> Any:
    """Tokens of each request and choice; `aborts`: who is ended before which call of `step`."""
    found: dict[tuple[str, int], list[int]] = {}
    for name, one in params.items():
        engine.add(name, PROMPTS[name], one)
    moment = 0
    while engine.has_work:
        if name := (aborts or {}).get(moment):
            engine.abort(name)
        for event in engine.step():
            if event.token >= 0:
                key = (event.sequence.request.request_id, event.sequence.choice)
                found.setdefault(key, []).append(event.token)
        engine.blocks.check_integrity()
        moment += 1
        assert moment < 300, "the requests do not end"
    assert engine.metrics().blocks_used == 0
    return found
