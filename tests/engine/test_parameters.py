"""Each parameter does to a running request what the page on sampling says, beside requests without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core import LLM, SamplingParams
from core.engine.outputs import CompletionOutput
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", params=["cpu_reference", "cpu", "tpu"])
def llm(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("params") / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    write_folder(path, byte_level(VOCAB))
    options = {"max_model_len": 128, "max_requests": 4, "num_blocks": 64, "show_progress": False}
    with LLM(path, backend=request.param, dtype="float32", **options) as found:
        yield found


def both(llm: LLM, params: SamplingParams) -> tuple[CompletionOutput, CompletionOutput]:
    """Greedily with the parameters, and without; both in one batch."""
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    alone = llm.generate([PROMPT], plain)[0].outputs[0]
    with_params, without = llm.generate([PROMPT, PROMPT], [params, plain])
    assert without.outputs[0].token_ids == alone.token_ids, "a neighbour's parameters changed a row"
    return with_params.outputs[0], without.outputs[0]


def greedy(**fields: object) -> SamplingParams:
    base = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**base, **fields})  # type: ignore[arg-type]


def test_a_bias_draws_its_id(llm: LLM) -> None:
    found, plain = both(llm, greedy(logit_bias={9: 1000.0}))
    assert set(found.token_ids) == {9} != set(plain.token_ids)
    banned = plain.token_ids[0]
    found, _ = both(llm, greedy(logit_bias={banned: float("-inf")}))
    assert banned not in found.token_ids


def test_only_allowed_ids_are_drawn(llm: LLM) -> None:
    found, plain = both(llm, greedy(allowed_token_ids=(3, 200, 77)))
    assert set(found.token_ids) <= {3, 77, 200} and not set(plain.token_ids) <= {3, 77, 200}


def test_nothing_ends_the_output_before_min_tokens(llm: LLM) -> None:
    _, plain = both(llm, greedy())
    stop = plain.token_ids[2]
    early, _ = both(llm, greedy(stop_token_ids=(stop,)))
    assert early.finish_reason == "stop" and len(early.token_ids) <= 3
    late, _ = both(llm, greedy(stop_token_ids=(stop,), min_tokens=7))
    assert stop not in late.token_ids[:7]
    assert late.token_ids[:2] == plain.token_ids[:2] and len(late.token_ids) >= 7
    after, _ = both(llm, greedy(stop_token_ids=(stop,), logit_bias={stop: 1000.0}, min_tokens=4))
    assert after.token_ids[4:] == (stop,) and after.finish_reason == "stop"


def test_log_probabilities_are_reported_for_each_token(llm: LLM) -> None:
    found, plain = both(llm, greedy(logprobs=4))
    assert plain.logprobs is None and plain.cumulative_logprob is None
    assert found.logprobs is not None and len(found.logprobs) == len(found.token_ids) == 12
    for token, known in zip(found.token_ids, found.logprobs, strict=True):
        assert len(known) == 4 and known[token].rank == 1
        values = [p.logprob for p in known.values()]
        assert values == sorted(values, reverse=True) and max(values) <= 0
        assert known[token].logprob == values[0]
    assert np.isclose(
        found.cumulative_logprob or 0,
        sum(f[t].logprob for t, f in zip(found.token_ids, found.logprobs, strict=True)),
    )
    biased, _ = both(llm, greedy(logprobs=2, logit_bias={9: 1000.0}))
    assert biased.logprobs is not None
    first = biased.logprobs[0]
    assert len(first) == 3 and first[9].rank is not None and first[9].rank > 2, "of the raw logits"


def test_none_of_them_changes_what_a_seed_draws_elsewhere(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, detokenize=False)
    alone = llm.generate([PROMPT], seeded)[0].outputs[0].token_ids
    beside = llm.generate([PROMPT, PROMPT], [seeded, greedy(logprobs=1, allowed_token_ids=(1, 2))])
    assert beside[0].outputs[0].token_ids == alone


def test_the_stop_text_stays_where_that_is_asked_for(llm: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    ids = llm.tokenizer.encode("abc", add_special_tokens=False)
    bias = dict.fromkeys(ids, 1000.0)
    text = llm.generate([PROMPT], SamplingParams(**params, logit_bias=bias))[0].outputs[0].text  # type: ignore[arg-type]
    stop = text[1:3]
    cut = llm.generate([PROMPT], SamplingParams(**params, logit_bias=bias, stop=(stop,)))[0].outputs[0]  # type: ignore[arg-type]
    kept = llm.generate(
        [PROMPT],
        SamplingParams(**params, logit_bias=bias, stop=(stop,), include_stop_str_in_output=True),  # type: ignore[arg-type]
    )[0].outputs[0]
    assert cut.stop_reason == kept.stop_reason == stop and cut.finish_reason == "stop"
    assert kept.text == cut.text + stop


def test_a_stop_text_ends_nothing_before_min_tokens(llm: LLM) -> None:
    ids = llm.tokenizer.encode("abc", add_special_tokens=False)
    forced = greedy(logit_bias=dict.fromkeys(ids, 1000.0), detokenize=True)
    whole, _ = both(llm, forced)
    stop = whole.text[0]
    early, _ = both(llm, replace(forced, stop=(stop,)))
    assert (early.text, len(early.token_ids), early.stop_reason) == ("", 1, stop)
    late, _ = both(llm, replace(forced, stop=(stop,), min_tokens=5))
    assert late.text == whole.text[: whole.text.find(stop, 5)] and len(late.token_ids) > 5
