"""An engine in a process of its own, for tests: options, starting and ending it, reading its streams."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.engine.async_llm import AsyncLLM
from core.engine.config import EngineConfig
from core.engine.outputs import RequestOutput
from core.sampling.params import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True, detokenize=False)
LONG = 30_000


def config(folder: Path, **options: Any) -> EngineConfig:
    """Options for the null backend and a small model."""
    base = EngineConfig(model=folder, backend="null", dtype="float32", max_model_len=128, max_requests=8)
    return replace(base, **options)


def endless(folder: Path, **options: Any) -> EngineConfig:
    """The same, for requests that do not end by themselves in a test's time."""
    memory = {"memory": str(1 << 30)}
    return config(long_model(folder), max_model_len=LONG, num_blocks=8000, backend_options=memory, **options)


def long_model(folder: Path) -> Path:
    """The model, made for more positions."""
    path = folder.parent / "long"
    if not path.exists():
        shutil.copytree(folder, path)
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": LONG}))
    return path


def serving(engine: EngineConfig, body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run a body with an engine, within a time."""

    async def run() -> None:
        async with asyncio.timeout(60):
            async with await AsyncLLM.start(engine) as llm:
                await body(llm)

    asyncio.run(run())


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The final output, each grown from the one before."""
    found: RequestOutput | None = None
    async for output in outputs:
        if found is not None:
            assert not found.finished
            for before, after in zip(found.outputs, output.outputs, strict=True):
                assert after.token_ids[: len(before.token_ids)] == before.token_ids
        found = output
    assert found is not None and found.finished
    return found


async def until(held: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not held():
            await asyncio.sleep(0.002)
