"""A seed gives the same tokens alone, in a batch, and after preemption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.sampling.params import SamplingParams
from tests.engine.playing import PROMPTS, open_engine, play
from tests.models.harness import CHUNKS, model_logits
from tests.sampling.margin import drawn, is_decided

Folder = Callable[[str], Path]

MARGIN = 1e-3
"""Of logits in float32; those of the tiny models are held to a tenth of it."""

SEEDED = SamplingParams(seed=5, max_tokens=24, ignore_eos=True)
KINDS: dict[str, SamplingParams] = {
    "plain": SEEDED,
    "hot": replace(SEEDED, temperature=3.0),
    "cold": replace(SEEDED, temperature=0.1),
    "top_k": replace(SEEDED, top_k=5),
    "top_p": replace(SEEDED, top_p=0.7),
    "min_p": replace(SEEDED, min_p=0.2, temperature=2.0),
    "all": replace(SEEDED, top_k=40, top_p=0.9, min_p=0.01, temperature=1.4),
}
RECURRENT = replace(KINDS["all"], presence_penalty=0.5, repetition_penalty=1.3, bad_words_ids=((3, 4), (5,)))


def neighbours(params: SamplingParams) -> dict[str, SamplingParams]:
    """Requests of other seeds beside "a"."""
    return {name: replace(params, seed=90 + i) for i, name in enumerate("bcd")}


def ways(folder: Path, backend: str, params: SamplingParams) -> dict[str, list[int]]:
    """Tokens of request "a" alone, in a batch, and in one that is preempted."""
    found = {}
    for way, blocks in (("alone", 64), ("batched", 64), ("preempted", 16)):
        engine = open_engine(folder, backend, 2, blocks)
        # Behind the others in the queue, so that it is "a" whose blocks are taken.
        others = {} if way == "alone" else neighbours(params)
        found[way] = play(engine, {**others, "a": params})["a", 0]
        assert (engine.scheduler.counters.preemptions > 0) == (way == "preempted")
        engine.close()
    return found


@pytest.mark.parametrize("kind", [*KINDS, "recurrent"])
def test_the_same_tokens_alone_batched_and_preempted(kind: str, tiny_folder: Folder) -> None:
    found = ways(tiny_folder("llama"), "cpu_reference", KINDS.get(kind, RECURRENT))
    assert found["alone"] == found["batched"] == found["preempted"]
    assert len(found["alone"]) == SEEDED.max_tokens


def check(folder: Path, params: SamplingParams, one: list[int], other: list[int]) -> None:
    """Assert that where they first differ, the oracle's draw is not decided."""
    at = next((i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y), None)
    if at is None:
        return
    ids = np.array([*PROMPTS["a"], *one], np.int32)
    padded = np.concatenate([ids, np.zeros(max(0, sum(CHUNKS) + 8 - len(ids)), np.int32)])
    position = len(PROMPTS["a"]) + at
    logits = model_logits(folder, padded, "cpu_reference", "float64")[position - 1]
    assert params.seed is not None
    assert not is_decided(logits, params, params.seed, position, MARGIN), f"token {at} differs"


@pytest.mark.parametrize("kind", KINDS)
def test_on_other_backends_up_to_the_first_draw_that_is_not_decided(kind: str, tiny_folder: Folder) -> None:
    folder, params = tiny_folder("llama"), KINDS[kind]
    found = ways(folder, "cpu", params)
    wanted = ways(folder, "cpu_reference", params)["alone"]
    for tokens in found.values():
        check(folder, params, wanted, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_most_draws_are_decided_those_are_right_and_another_token_is_noticed(
    kind: str, tiny_folder: Folder
) -> None:
    folder, params = tiny_folder("llama"), KINDS[kind]
    engine = open_engine(folder, "cpu_reference", 2)
    tokens = play(engine, {"a": params})["a", 0]
    engine.close()
    ids = np.array([*PROMPTS["a"], *tokens, *[0] * sum(CHUNKS)], np.int32)
    logits = model_logits(folder, ids, "cpu_reference", "float64")
    first, seed = len(PROMPTS["a"]), 5
    decided = [is_decided(logits[first + i - 1], params, seed, first + i, MARGIN) for i in range(len(tokens))]
    assert np.mean(decided) >= 0.9
    for i in np.flatnonzero(decided):
        assert tokens[i] == drawn(logits[first + i - 1], params, seed, first + int(i)), f"token {i}"
    at = decided.index(True)
    wrong = [*tokens[:at], (tokens[at] + 1) % 256, *tokens[at + 1 :]]
    with pytest.raises(AssertionError, match="differs"):
        check(folder, params, tokens, wrong)


def test_a_seed_on_a_compiled_backend(tiny_folder: Folder) -> None:
    """One engine for all kinds: compiling takes the time."""
    folder = tiny_folder("llama")
    engine = open_engine(folder, "tpu", 2)
    reference = open_engine(folder, "cpu_reference", 2)
    for params in KINDS.values():
        wanted: Any = play(reference, {"a": params})["a", 0]
        check(folder, params, wanted, play(engine, {"a": params})["a", 0])
        check(folder, params, wanted, play(engine, {**neighbours(params), "a": params})["a", 0])
    engine.close()
    reference.close()
