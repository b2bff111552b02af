"""Logits that are no numbers end the sequence that they are of, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core import LLM
from core.contract.interfaces import CompileRequest, StepFunction
from core.engine.engine import Engine
from core.plugins import BackendHandle
from core.sampling.params import SamplingParams
from tests.engine.playing import open_engine
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

Folder = Callable[[str], Path]

BAD = 7
"""A token whose embedding is turned into NaN."""
GOOD = {"b": tuple(range(40, 46)), "c": (9, 8, 9, 8, 10, 11)}
PLAIN = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, allowed_token_ids=None)
ASKED = {
    "greedy": PLAIN,
    "drawn": replace(PLAIN, temperature=0.8, top_p=0.9, top_k=40, seed=3),
    "log-probabilities": replace(PLAIN, logprobs=2),
    "prompt": replace(PLAIN, prompt_logprobs=1),
    "penalties": replace(PLAIN, presence_penalty=1.0, repetition_penalty=1.5),
    "allowed": replace(PLAIN, allowed_token_ids=tuple(range(20, 90))),
}


@pytest.fixture
def poisoned(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in which the embedding of one token is NaN, and a loader that lets it pass."""
    folder = tiny_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    monkeypatch.setattr("core.weights.verify._count_bad", lambda *arguments: 0)
    monkeypatch.setattr("core.weights.verify._count_infinite", lambda *arguments: 0)
    return tmp_path


def play(engine: Engine, prompts: dict[str, tuple[int, ...]], params: SamplingParams) -> dict[Any, Any]:
    """Tokens, and the reason of the end, of each request and choice."""
    for name, prompt in prompts.items():
        engine.add(name, prompt, params)
    tokens: dict[Any, list[int]] = {}
    ends: dict[Any, tuple[Any, ...]] = {}
    for _ in range(200):
        if not engine.has_work:
            break
        for event in engine.step():
            key = (event.sequence.request.request_id, event.sequence.choice)
            if event.token >= 0:
                tokens.setdefault(key, []).append(event.token)
            if event.finished:
                ends[key] = (event.sequence.finish_reason, event.sequence.stop_reason)
        engine.blocks.check_integrity()
    assert not engine.has_work and engine.metrics().blocks_used == 0
    return {key: (tokens.get(key, []), *end) for key, end in ends.items()}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("backend", ["cpu", "cpu_reference"])
def test_such_a_row_ends_its_request_alone(backend: str, kind: str, depth: int, poisoned: Path) -> None:
    bad = {"a": (*range(20, 30), BAD, 30, 31)}
    engine = open_engine(poisoned, backend, depth)
    alone = play(engine, GOOD, ASKED[kind])
    found = play(engine, {"b": GOOD["b"], **bad, "c": GOOD["c"]}, ASKED[kind])
    tokens, reason, sentence = found.pop(("a", 0))
    assert (tokens, reason) == ([], "error") and "no token could be drawn" in sentence
    assert found == alone and {len(t) for t, *_ in found.values()} == {6}
    # A step in flight reads its ids from there.
    executor: Any = engine._executor
    assert np.asarray(executor._worker.runner._state.last).min() >= 0
    # Its blocks, with what was written to them, are given to others. (A static backend would compile anew.)
    small = engine if backend == "tpu" else open_engine(poisoned, backend, depth, blocks=12)
    for _ in range(4):
        again = play(small, bad | GOOD, ASKED[kind])
        assert again.pop(("a", 0))[1] == "error" and again == alone
    assert engine.metrics().finished["error"] == (5 if small is engine else 1)
    for one in (engine, small):
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "log-probabilities"])
def test_such_a_row_ends_its_request_alone_on_a_static_backend(kind: str, poisoned: Path) -> None:
    test_such_a_row_ends_its_request_alone("tpu", kind, 2, poisoned)


@pytest.mark.parametrize("prompt", [(*range(20, 25), BAD, *range(25, 45)), (*range(20, 44), BAD)])
def test_nothing_of_such_a_request_stays_in_the_prefix_cache(prompt: tuple[int, ...], poisoned: Path) -> None:
    engine = open_engine(poisoned, "cpu", 2)
    play(engine, {"b": GOOD["b"]}, PLAIN)
    kept = engine.metrics().blocks_cached
    assert kept > 0
    # More tokens than a step takes: the first part is cached before the failure shows.
    assert len(prompt) > 16
    play(engine, {"a": prompt}, PLAIN)
    assert engine.metrics().blocks_cached == kept
    assert engine.blocks.lookup(np.array(prompt, np.int32)).num_tokens == 0
    engine.close()


def test_every_choice_of_such_a_request_ends(poisoned: Path) -> None:
    engine = open_engine(poisoned, "cpu", 2)
    found = play(engine, {"a": (*range(20, 30), BAD)}, replace(PLAIN, n=3, temperature=1.0, seed=5))
    assert [end[:2] for end in found.values()] == [([], "error")] * 3
    engine.close()


def test_a_failure_after_some_tokens_keeps_them(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fifth step on, logits are infinite."""
    compile_ = BackendHandle.compile
    calls: list[int] = []

    def compiled(self: BackendHandle, request: CompileRequest) -> Any:
        fn: StepFunction = request.fn

        def failing(*arguments: Any) -> Any:
            logits, caches = fn(*arguments)
            calls.append(1)
            return (logits * np.inf if len(calls) >= 5 else logits), caches

        return compile_(self, replace(request, fn=failing))

    monkeypatch.setattr(BackendHandle, "compile", compiled)
    engine = open_engine(tiny_folder("llama"), "cpu", 2)
    (tokens, reason, _) = play(engine, {"b": GOOD["b"]}, PLAIN)["b", 0]
    assert len(tokens) == 4 and reason == "error"
    engine.close()


def test_a_user_is_told_by_reason_and_sentence(poisoned: Path) -> None:
    options: dict[str, Any] = {"backend": "cpu", "dtype": "float32", "max_model_len": 48, "num_blocks": 32}
    write_folder(poisoned, byte_level(VOCAB))
    with LLM(poisoned, show_progress=False, **options) as llm:
        bad, good = llm.generate([[20, BAD, 21], [20, 21]], replace(PLAIN, detokenize=False))
    assert bad.outputs[0].finish_reason == "error" and "NaN or infinite" in str(bad.outputs[0].stop_reason)
    assert bad.outputs[0].token_ids == () and good.outputs[0].finish_reason == "length"
