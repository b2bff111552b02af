"""What a stream sends of a growing text: never what a stop text may take back, and all of the rest."""

from __future__ import annotations

import pytest

from core.engine.outputs import CompletionOutput, Logprob
from core.sampling.params import SamplingParams
from core.server.deltas import Growth

TEXT = "abENxEND"


def sent(params: SamplingParams, text: str = TEXT, end: int | None = None) -> list[str]:
    """The texts of the deltas of an output that grows by a character a step, and ends cut at `end`."""
    growth, found = Growth(params), []
    for size in range(1, len(text) + 1):
        is_last = size == len(text)
        shown = text[:end] if is_last else text[:size]
        reason = "stop" if is_last else None
        delta = growth.take(CompletionOutput(0, shown, tuple(range(size)), reason))
        assert delta is not None and delta.token_ids == (size - 1,)
        found.append(delta.text)
    assert growth.take(CompletionOutput(0, shown, tuple(range(size)), "stop")) is None
    return found


def test_what_may_become_a_stop_text_is_held_back_and_what_did_not_is_sent() -> None:
    assert sent(SamplingParams(stop=("END",)), end=5) == ["a", "b", "", "", "ENx", "", "", ""]


def test_what_never_became_a_stop_text_is_sent_at_the_end() -> None:
    assert sent(SamplingParams(stop=("END",)), "abEN") == ["a", "b", "", "EN"]


def test_nothing_is_held_back_where_the_stop_text_stays() -> None:
    params = SamplingParams(stop=("END",), include_stop_str_in_output=True)
    assert sent(params) == list(TEXT)


def test_the_longest_of_several_beginnings_is_held_back() -> None:
    assert sent(SamplingParams(stop=("xy", "ENxyz")), "abENxq") == ["a", "b", "", "", "", "ENxq"]


@pytest.mark.parametrize("has_logprobs", [True, False])
def test_log_probabilities_and_offsets_are_those_of_the_new_tokens(has_logprobs: bool) -> None:
    growth = Growth(SamplingParams(stop=("bc",), logprobs=0 if has_logprobs else None))
    found = tuple({i: Logprob(-float(i), 1)} for i in range(3)) if has_logprobs else None
    places = (0, 1, 2) if has_logprobs else None
    first = growth.take(
        CompletionOutput(0, "a", (0,), logprobs=found and found[:1], text_offsets=places and places[:1])
    )
    rest = growth.take(CompletionOutput(0, "abx", (0, 1, 2), logprobs=found, text_offsets=places))
    assert first is not None and rest is not None
    assert (first.logprobs, rest.logprobs) == ((found[:1], found[1:]) if found else (None, None))
    assert (first.text_offsets, rest.text_offsets) == (((0,), (1, 2)) if has_logprobs else ((), ()))
