"""What parameters do to logits, in their order, and what is reported of the raw ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.errors import RequestError
from core.contract.types import SamplingBatch
from core.runner.sampling import allowed_mask
from core.sampling.params import SamplingParams
from core.sampling.reference import sample

Float32 = npt.NDArray[np.float32]
V = 70


def batch(n: int, temperature: float = 0.0, **fields: Any) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.full(n, temperature, np.float32),
        top_k=fields.pop("top_k", np.zeros(n, np.int32)),
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        seed=np.arange(n).astype(np.uint64),
        position=np.arange(n).astype(np.int32),
        choice=np.zeros(n, np.int32),
        **fields,
    )


def biased(rows: list[dict[int, float]]) -> dict[str, Any]:
    return {
        "bias_ids": np.array([i for row in rows for i in row], np.int32),
        "bias_values": np.array([v for row in rows for v in row.values()], np.float32),
        "bias_start": np.cumsum([0, *map(len, rows)]).astype(np.int32),
    }


@pytest.fixture
def logits() -> Float32:
    return np.random.default_rng(0).standard_normal((4, V)).astype(np.float32)


def test_a_bias_is_added_to_its_row_and_id_and_to_nothing_else(logits: Float32) -> None:
    rows: list[dict[int, float]] = [{5: 50.0}, {}, {6: 50.0, 7: 60.0}, {}]
    tokens = sample(logits, batch(4, **biased(rows))).tokens
    plain = sample(logits, batch(4)).tokens
    assert tokens.tolist() == [5, plain[1], 7, plain[3]]


def test_the_callers_logits_are_left_as_they_were(logits: Float32) -> None:
    before = logits.copy()
    mask = np.stack([allowed_mask(SamplingParams(allowed_token_ids=(3,)), V)] * 4)
    sample(logits, batch(4, bitmask=mask, **biased([{1: 2.0}] * 4)))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_a_forbidden_token_is_never_drawn(temperature: float) -> None:
    n = 3000
    allowed = (0, 31, 32, 63, 64, 69)
    logits = np.zeros((n, V), np.float32)
    logits[:, 40] = 1e4
    mask = np.stack([allowed_mask(SamplingParams(allowed_token_ids=allowed), V)] * n)
    drawn = set(sample(logits, batch(n, temperature, bitmask=mask)).tokens.tolist())
    assert drawn <= set(allowed) and (temperature == 0 or drawn == set(allowed))
    rows = [dict.fromkeys((i for i in range(V) if i not in allowed), -np.inf)] * n
    assert set(sample(logits, batch(n, temperature, **biased(rows))).tokens.tolist()) == drawn


def test_a_bias_comes_before_the_cut_of_top_k() -> None:
    logits = np.zeros((200, V), np.float32)
    logits[:, :3] = 5.0
    fields = biased([{50: 9.0}] * 200)
    drawn = sample(logits, batch(200, 1.0, top_k=np.full(200, 1, np.int32), **fields)).tokens
    assert set(drawn.tolist()) == {50}


def test_log_probabilities_are_those_of_the_raw_logits(logits: Float32) -> None:
    wanted = np.array([3, -1, 0, 5], np.int32)
    found = sample(logits, batch(4, logprobs=wanted, **biased([{5: 50.0}, {}, {}, {}])))
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert found.tokens[0] == 5 and np.isnan(found.logprobs[1])
    for i in (0, 2, 3):
        token = found.tokens[i]
        assert abs(found.logprobs[i] - exact[i, token]) < 1e-6
        assert found.ranks[i] == 1 + (logits[i] > logits[i, token]).sum()
    order = np.argsort(-logits[3], kind="stable")[:5]
    assert found.top_ids[3].tolist() == order.tolist()
    assert np.allclose(found.top_logprobs[3], exact[3, order], atol=1e-6)
    assert found.ranks[0] > 1 and 5 not in found.top_ids[0].tolist()


def test_the_most_likely_of_equals_are_the_lowest_ids() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, 40] = 1.0
    found = sample(logits, batch(1, logprobs=np.array([4], np.int32)))
    assert found.top_ids[0].tolist() == [40, 0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "at most max_tokens, 8"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"logit_bias": {3: float("nan")}}, "below infinity"),
        ({"logit_bias": {3: float("inf")}}, "below infinity"),
        ({"allowed_token_ids": ()}, "at least one id"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": {V: 1.0}}, f"names token id {V}"),
        ({"allowed_token_ids": (-1,)}, "names token id -1"),
        ({"stop_token_ids": (V,)}, f"names token id {V}"),
        ({"allowed_token_ids": (3,), "logit_bias": {3: float("-inf")}}, "leave no token"),
        ({"allowed_token_ids": (2, 9), "stop_token_ids": (9,), "min_tokens": 1}, "leave no token"),
        ({"logit_bias": dict.fromkeys(range(V), float("-inf"))}, "leave no token"),
    ],
)
def test_parameters_that_the_vocabulary_does_not_bear_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields).check_ids(V, (2,))
    SamplingParams(logit_bias={V - 1: 1.0}, allowed_token_ids=(0, 2), min_tokens=1).check_ids(V, (2,))
