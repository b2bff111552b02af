"""Draws that depend on earlier output: the same at any depth of overlap, and what each parameter does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from core.sampling.params import SamplingParams
from tests.engine.playing import PROMPTS, open_engine, play

Folder = Callable[[str], Path]

WARM = SamplingParams(temperature=0.9, seed=11, max_tokens=14, ignore_eos=True)
RECURRENT: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.8},
    "negative": {"presence_penalty": -2.0, "frequency_penalty": -2.0, "repetition_penalty": 0.5},
}


def bans_of(tokens: list[int]) -> tuple[tuple[int, ...], ...]:
    """Bans of two and three ids that these tokens break."""
    return (tuple(tokens[2:4]), tuple(tokens[5:8]))


def mixed(folder: Path) -> dict[str, dict[str, SamplingParams]]:
    """Batches in which one request is recurrent, and others are not."""
    engine = open_engine(folder, "cpu_reference", 1)
    plain = play(engine, dict.fromkeys(PROMPTS, WARM))
    engine.close()
    kinds = RECURRENT | {"bans": {"bad_words_ids": bans_of(plain["a", 0])}}
    greedy = SamplingParams(temperature=0, max_tokens=11, ignore_eos=True)
    return {
        kind: {"a": replace(WARM, **fields), "b": WARM, "c": greedy, "d": replace(greedy, **fields)}
        for kind, fields in kinds.items()
    }


@pytest.mark.parametrize("backend", ["cpu_reference", "cpu", "tpu"])
def test_overlapped_equals_not_overlapped(backend: str, tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    batches = mixed(folder)
    found: dict[tuple[int, int], Any] = {}
    # A static backend compiles anew in each engine; what preemption does is core's affair.
    worlds = ((1, 64), (2, 16)) if backend == "tpu" else ((1, 64), (2, 64), (2, 16))
    for depth, blocks in worlds:
        engine = open_engine(folder, backend, depth, blocks)
        found[depth, blocks] = {kind: play(engine, batch) for kind, batch in batches.items()}
        preempted = engine.scheduler.counters.preemptions
        engine.close()
        assert bool(preempted) == (blocks == 16)
    assert all(tokens == found[1, 64] for tokens in found.values())
    plain = found[1, 64]["bans"]["b", 0]
    assert all(tokens["b", 0] == plain for tokens in found[1, 64].values()), "a neighbour was changed"


@pytest.mark.parametrize("depth", [2, 3])
def test_aborts_beside_a_step_that_waits_for_its_sampling(depth: int, tiny_folder: Folder) -> None:
    folder = tiny_folder("llama")
    recurrent = replace(WARM, frequency_penalty=1.5, max_tokens=7)
    params = {"a": recurrent, "b": replace(WARM, max_tokens=9), "d": recurrent}
    engine = open_engine(folder, "cpu_reference", 1)
    whole = play(engine, params)
    engine.close()
    engine = open_engine(folder, "cpu_reference", depth)
    for moment in range(12):
        for name in params:
            found = play(engine, params, {moment: name})
            for (request, choice), tokens in found.items():
                wanted = whole[request, choice]
                assert tokens == (wanted[: len(tokens)] if request == name else wanted)
    engine.close()


def test_the_late_sampling_is_used_only_where_a_token_is_awaited(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tiny_folder("llama"), "cpu_reference", 2)
    late: list[int] = []
    sample = engine._executor.sample
    monkeypatch.setattr(engine._executor, "sample", lambda s, b: (late.append(s), sample(s, b)))
    play(engine, {"a": WARM, "b": replace(WARM, bad_words_ids=((7,),), logit_bias={3: 1.0})})
    assert late == []
    play(engine, {"a": WARM, "b": replace(WARM, presence_penalty=1.0)})
    # Every token but the first, which depends on the prompt alone.
    assert len(late) == 13
    engine.close()


def test_choices_of_a_prompt_have_each_their_own_history(tiny_folder: Folder) -> None:
    params = replace(WARM, n=3, presence_penalty=2.0, temperature=2.0)
    found = []
    for depth in (1, 2):
        engine = open_engine(tiny_folder("llama"), "cpu_reference", depth)
        found.append(play(engine, {"a": params}))
        engine.close()
    assert found[0] == found[1] and len(set(map(tuple, found[0].values()))) == 3


def test_two_ranks_draw_the_same(tiny_folder: Folder) -> None:
    params = {"a": replace(WARM, repetition_penalty=1.8), "b": replace(WARM, bad_words_ids=((1, 2),))}
    found = []
    for ranks in (1, 2):
        engine = open_engine(tiny_folder("llama"), "cpu", 2, tensor_parallel=ranks)
        found.append(play(engine, params))
        engine.close()
    assert found[0] == found[1]


def longest_run(tokens: list[int]) -> int:
    """How often the most frequent id is there."""
    return max(map(tokens.count, tokens))


@pytest.mark.parametrize("backend", ["cpu_reference", "cpu", "tpu"])
def test_each_parameter_does_what_it_says(backend: str, tiny_folder: Folder) -> None:
    engine = open_engine(tiny_folder("llama"), backend, 2)
    base = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)

    def tokens(**fields: Any) -> list[int]:
        found: list[int] = play(engine, {"c": replace(base, **fields)})["c", 0]
        return found

    forced = dict.fromkeys((5, 6, 7), 1000.0)
    assert longest_run(tokens(logit_bias=forced)) > 12
    by_count = tokens(logit_bias=dict.fromkeys((5, 6, 7), 100.0), frequency_penalty=2.0)
    assert longest_run(by_count[:9]) <= 5
    once = tokens(logit_bias=dict.fromkeys(range(5, 35), 10.0), presence_penalty=2.0)
    assert longest_run(once) < longest_run(tokens(logit_bias=dict.fromkeys(range(5, 35), 10.0)))
    never = tokens(repetition_penalty=1e6)
    assert len(set(never)) == len(never) and not set(never) & set(PROMPTS["c"])
    assert set(tokens(logit_bias={8: 1000.0}, repetition_penalty=1e6)).isdisjoint({8}), "the prompt counts"
    pair = tokens(logit_bias=forced)[:2]
    banned = tokens(logit_bias=forced, bad_words_ids=(tuple(pair),))
    assert tuple(pair) not in set(pairwise(banned)) and pair[0] in banned
    assert pair[0] not in tokens(logit_bias=forced, bad_words_ids=((pair[0],),))
    engine.close()
