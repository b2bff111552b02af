"""Log-probabilities of a prompt are those that its tokens have one by one, however the prompt is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_test_plugins.null import SPEC, NullBackend

from core.contract.errors import RequestError
from core.contract.spec import ShapeRules
from core.engine import engine as engine_module
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.engine.stream import StreamEvent, stream_event
from core.plugins import Plugins
from core.sampling.params import SamplingParams

PROMPT = [5, 90, 17, 33, 200, 8, 61, 4, 77, 120, 3, 9]
BACKENDS = {"cpu_reference": 0.0, "cpu": 1e-4, "tpu": 1e-4}
"""Differences allowed: none where a row's bits depend on nothing else."""

Folder = Callable[[str], Path]


def run(
    engine: Engine, params: dict[str, SamplingParams], prompt: list[int] = PROMPT
) -> dict[str, list[StreamEvent]]:
    """Events of requests that run together."""
    for name, one in params.items():
        engine.add(name, prompt, one)
    found: dict[str, list[StreamEvent]] = {name: [] for name in params}
    while engine.has_work:
        for event in engine.step():
            found[event.sequence.request.request_id].append(stream_event(event))
    return found


def start(folder: Path, backend: str, **options: Any) -> Engine:
    dtype = "float64" if backend == "cpu_reference" else "float32"
    fixed = {"max_model_len": 64, "max_requests": 4, "block_size": 8 if backend == "tpu" else 4}
    return Engine(EngineConfig(model=folder, backend=backend, dtype=dtype, **{**fixed, **options}))


def asking(**fields: Any) -> SamplingParams:
    base = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "prompt_logprobs": 2}
    return SamplingParams(**{**base, **fields})


@pytest.fixture(scope="module")
def one_by_one(tiny_folder: Folder) -> Iterator[Callable[[str], list[Any]]]:
    """Per backend, what each prompt token gets as the forced token after those before it."""
    known: dict[str, list[Any]] = {}

    def of(backend: str) -> list[Any]:
        if backend not in known:
            engine = start(tiny_folder("llama"), backend, prefix_cache=False)
            known[backend] = []
            for i in range(1, len(PROMPT)):
                forced = SamplingParams(
                    temperature=0, max_tokens=1, logprobs=2, logit_bias={PROMPT[i]: 1e6}, ignore_eos=True
                )
                events = run(engine, {"a": forced}, PROMPT[:i])["a"]
                assert events[0].token == PROMPT[i]
                known[backend].append(events[0].logprobs)
            engine.close()
        return known[backend]

    yield of


def check(found: StreamEvent, wanted: list[Any], bound: float) -> None:
    assert found.prompt_logprobs is not None and found.prompt_logprobs[0] is None
    assert len(found.prompt_logprobs) == len(PROMPT)
    for got, (logprob, rank, ids, values) in zip(found.prompt_logprobs[1:], wanted, strict=True):
        assert got is not None and (got[1], got[2]) == (rank, ids)
        assert abs(got[0] - logprob) <= bound
        assert all(abs(a - b) <= bound for a, b in zip(got[3], values, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 5, "overlap": 2}, {"overlap": 3}],
    ids=["whole", "in chunks", "overlapped"],
)
def test_they_are_those_of_the_tokens_one_by_one(
    tiny_folder: Folder, one_by_one: Callable[[str], list[Any]], backend: str, options: dict[str, Any]
) -> None:
    engine = start(tiny_folder("llama"), backend, **options)
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for _ in range(2):
        found = run(engine, {"beside": plain, "asks": asking(), "n": asking(n=2)})
        check(found["asks"][0], one_by_one(backend), BACKENDS[backend])
        assert all(e.prompt_logprobs is None for e in found["asks"][1:] + found["beside"])
        told = [e for e in found["n"] if e.prompt_logprobs is not None]
        assert [e.choice for e in told] == [0]
        check(told[0], one_by_one(backend), BACKENDS[backend])
        tokens = [e.token for e in found["beside"] if e.token >= 0]
        assert [e.token for e in found["asks"] if e.token >= 0] == tokens
    engine.close()


def test_a_preempted_request_has_them_once_and_whole(
    tiny_folder: Folder, one_by_one: Callable[[str], list[Any]]
) -> None:
    engine = start(tiny_folder("llama"), "cpu_reference", num_blocks=7, max_batch_tokens=5)
    found = run(engine, {name: asking(max_tokens=8) for name in "abc"})
    assert engine.metrics().preemptions > 0
    for events in found.values():
        told = [e for e in events if e.prompt_logprobs is not None]
        assert len(told) == 1
        check(told[0], one_by_one("cpu_reference"), 0.0)
    engine.close()


def test_logits_of_a_step_are_bounded(
    tiny_folder: Folder, one_by_one: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LOGIT_BYTES", 1)
    engine = start(tiny_folder("llama"), "cpu_reference")
    sizes = []
    submit = engine._executor.submit

    def watched(batch: Any, *rest: Any) -> None:
        if batch.bucket.outputs.all_logits:
            sizes.append(batch.num_tokens)
        submit(batch, *rest)

    monkeypatch.setattr(engine._executor, "submit", watched)
    found = run(engine, {"a": asking(), "b": asking(), "c": SamplingParams(temperature=0, max_tokens=9)})
    assert len(sizes) > 2 and max(sizes) <= 5
    check(found["a"][0], one_by_one("cpu_reference"), 0.0)
    engine.close()


def test_a_prompt_of_one_token_has_none(tiny_folder: Folder) -> None:
    engine = start(tiny_folder("llama"), "cpu_reference")
    assert run(engine, {"a": asking()}, [5])["a"][0].prompt_logprobs == (None,)
    engine.close()


def test_a_static_backend_refuses_them(tiny_folder: Folder) -> None:
    from dataclasses import replace

    plugins = Plugins()
    shapes = ShapeRules(kind="static", token_buckets=(8,), request_buckets=(2,), width_buckets=(4,))
    plugins.register_backend(NullBackend(replace(SPEC, name="static", shapes=shapes)), "static")
    engine = Engine(
        EngineConfig(model=tiny_folder("llama"), backend="static", max_model_len=64), plugins=plugins
    )
    with pytest.raises(RequestError, match="no compiled shape"):
        engine.add("a", [5, 6], asking())
    engine.close()
