"""What parameters do to logits, in their order, and what is reported of the raw ones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from core.contract.errors import RequestError
from core.contract.types import SamplingBatch
from core.runner.sampling import allowed_mask
from core.sampling.params import SamplingParams
from core.sampling.reference import penalize, sample
from tests.tokenizer.small import byte_fallback

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
        ({"logit_bias": {3: float("nan")}}, "up to 1e"),
        ({"logit_bias": {3: float("inf")}}, "up to 1e"),
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


def penalized(row: Float32, prompt: list[int], output: list[int], p: float, f: float, r: float) -> Float32:
    """The page's rule, id by id."""
    found = row.copy()
    for i in range(len(row)):
        if i in prompt or i in output:
            found[i] = found[i] / np.float32(r) if found[i] > 0 else found[i] * np.float32(r)
        if i in output:
            found[i] = found[i] - np.float32(f) * np.float32(output.count(i)) - np.float32(p)
    return found


PENALTIES = [(0.7, 0.0, 1.0), (0.0, 0.4, 1.0), (0.0, 0.0, 1.7), (-1.5, -0.3, 0.6), (2.0, 1.1, 3.0)]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_change_logits_of_ids_that_were_there(
    penalties: tuple[float, float, float], logits: Float32
) -> None:
    rng = np.random.default_rng(3)
    for row in logits:
        prompt, output = rng.integers(0, V, 9).tolist(), rng.integers(0, 12, 20).tolist()
        found = row.copy()
        penalize(
            found,
            np.array(prompt, np.int32),
            np.array(output, np.int32),
            *(np.float32(value) for value in penalties),
        )
        assert np.array_equal(found, penalized(row, prompt, output, *penalties))
        assert not np.array_equal(found, row)


def test_penalties_of_a_row_leave_its_neighbours_alone(logits: Float32) -> None:
    none = np.zeros(0, np.int32)
    top = logits.argmax(-1).astype(np.int32)
    fields = {
        "presence": np.array([0, 2, 0, 0], np.float32),
        "frequency": np.array([0, 0, 2, 0], np.float32),
        "repetition": np.array([1, 1, 1, 9], np.float32),
        "history": ((none, none), (none, top[1:2]), (none, top[2:3].repeat(3)), (top[3:4], none)),
    }
    tokens = sample(logits, batch(4, **fields)).tokens
    assert tokens[0] == top[0] and (tokens[1:] != top[1:]).all()


def test_a_bias_is_added_before_the_penalty_divides() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, 8] = 3.0
    none = np.zeros(0, np.int32)
    fields = {
        "presence": np.zeros(1, np.float32),
        "frequency": np.zeros(1, np.float32),
        "repetition": np.array([2.0], np.float32),
        "history": ((np.array([5], np.int32), none),),
        **biased([{5: 5.0}]),
    }
    # 5 / 2 loses to 3; 0 / 2 + 5 would win.
    assert sample(logits, batch(1, **fields)).tokens[0] == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"stop": tuple(map(str, range(65)))},
        {"stop": ("x" * 20_000,)},
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 1e300},
        {"top_k": 2**31},
        {"top_k": 2.5},
        {"n": 1.5},
        {"max_tokens": 2.5},
        {"seed": 1.5},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": {1: -1e39}},
        {"logit_bias": {1: float("nan")}},
        {"bad_words": ("",)},
        {"bad_words_ids": ((),)},
        {"bad_words_ids": tuple((i,) for i in range(1025))},
        {"bad_words": ("x" * 40_000, "y" * 40_000)},
    ],
)
def test_penalties_and_bans_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_bans_are_held_against_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="token id 70"):
        SamplingParams(bad_words_ids=((1, 70),)).check_ids(V, ())
    with pytest.raises(RequestError, match="leave no token"):
        SamplingParams(allowed_token_ids=(4, 5), bad_words_ids=((4,), (4, 5))).check_ids(V, ())
    with pytest.raises(RequestError, match="bad_words_ids"):
        SamplingParams(bad_words=("x",)).check_ids(V, ())
    SamplingParams(allowed_token_ids=(4, 5, 6), bad_words_ids=((4,), (4, 5))).check_ids(V, ())


def test_bad_words_are_banned_at_the_beginning_and_inside_of_a_text() -> None:
    tokens = {
        "cat": [1, 2],
        " cat": [3],
        "\n": [4],
        "none": [],
        " none": [],
        "(": [5],
        "(cat": [5, 6],
        "(\n": [8],
    }
    tokens |= {"\n\n": [4, 4], "(none": [5], "\nnone": [4], '"none': [7], '"': [7]}
    params = SamplingParams(bad_words=("cat", "\n"), bad_words_ids=((9,),)).resolved(lambda t: tokens[t])
    assert params.bad_words_ids == ((9,), (1, 2), (3,), (6,), (4,)) and not params.bad_words
    with pytest.raises(RequestError, match="'none' has no tokens"):
        SamplingParams(bad_words="none").resolved(lambda t: tokens[t])  # type: ignore[arg-type]


def test_a_bad_word_is_banned_inside_a_word_of_a_vocabulary_that_marks_beginnings() -> None:
    tokenizer = byte_fallback()
    encode = partial(_ids, tokenizer)
    params = SamplingParams(bad_words=("he",)).resolved(encode)
    banned = {tuple(tokenizer.id_to_token(i) for i in ban) for ban in params.bad_words_ids}
    assert {("\u2581he",), ("he",)} <= banned
    assert encode("(he")[-1:] in map(list, params.bad_words_ids)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_a_temperature_too_low_for_float32_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).temperature == 0


@pytest.mark.parametrize(
    "fields",
    [
        *({name: value} for name in ("n", "top_k", "min_tokens", "max_tokens") for value in (1.5, True, "1")),
        *({name: value} for name in ("seed", "logprobs", "prompt_logprobs") for value in (1.5, True, "1")),
        *({name: None} for name in ("n", "top_k", "min_tokens", "temperature", "top_p", "ignore_eos")),
        *(
            {name: value}
            for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
            for value in ("1", True, math.nan, 10**400, 1j)
        ),
        *({"repetition_penalty": value} for value in ("1", True, math.nan, math.inf)),
        *({name: value} for name in ("stop", "bad_words") for value in (5, (1,), ("a", b""), {"a": 1})),
        *({name: value} for name in ("stop_token_ids", "allowed_token_ids") for value in ("12", 5, {3: 1})),
        *({name: (v,)} for name in ("stop_token_ids", "allowed_token_ids") for v in ("a", 1.9, True, None)),
        *({"bad_words_ids": value} for value in (5, "a", ((1.7,),), (3,), ("12",))),
        *({"logit_bias": value} for value in ({1.9: 1}, {"1": 1}, {1: "1"}, {True: 1}, [1], {1: math.nan})),
        *({name: value} for name in ("ignore_eos", "detokenize") for value in ("false", 0)),
        *({name: value} for name in ("skip_special_tokens", "include_stop_str_in_output") for value in ("",)),
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_value_of_another_type_is_refused_by_the_fields_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(RequestError, match=rf"^{name}('s id)? (is|holds) .*; it must be ") as caught:
        SamplingParams(**fields)
    assert len(str(caught.value)) < 400


def test_numbers_of_numpy_and_lists_become_plain_ones() -> None:
    given = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_p=1,
        seed=np.uint64(2**64 - 1),
        stop=["a"],  # type: ignore[arg-type]
        stop_token_ids=np.arange(3),
        allowed_token_ids=[4, np.int32(4), 5],  # type: ignore[arg-type]
        bad_words_ids=[[1, 2]],  # type: ignore[arg-type]
        logit_bias={np.int64(1): np.float64(2), 2: -math.inf},
    )
    wanted = SamplingParams(
        n=2,
        temperature=0.5,
        seed=2**64 - 1,
        stop=("a",),
        stop_token_ids=(0, 1, 2),
        allowed_token_ids=(4, 5),
        bad_words_ids=((1, 2),),
        logit_bias={1: 2.0, 2: -math.inf},
    )
    assert given == wanted
    whole = (given.n, given.seed, *given.stop_token_ids, *(given.logit_bias or ()))
    assert {type(v) for v in whole} == {int}
    assert type(given.temperature) is type(given.top_p) is float
