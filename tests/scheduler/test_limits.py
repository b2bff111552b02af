"""What a request may ask for, by its size."""

from __future__ import annotations

import pytest

from core.block_manager import CacheGroup
from core.contract.errors import RequestError
from core.sampling.params import SamplingParams
from core.scheduler import Limits

PAGED = CacheGroup(kind="paged", layers=(0,), block_size=4, num_blocks=11)
STATE = CacheGroup(kind="state", layers=(1,), block_size=4, num_blocks=2)


def limits(*groups: CacheGroup, length: int = 64, multiple: int = 1) -> Limits:
    return Limits(max_model_len=length, max_rows=3, prefill_multiple=multiple, groups=groups)


def window(size: int, num_blocks: int) -> CacheGroup:
    return CacheGroup(kind="window", layers=(2,), block_size=4, num_blocks=num_blocks, window=size)


def test_the_tokens_of_a_request_are_bounded_by_the_maximum_length() -> None:
    found = limits(PAGED)
    assert found.tokens(10, SamplingParams(max_tokens=5)) == 15
    assert found.tokens(10, SamplingParams(max_tokens=500)) == 64
    assert found.tokens(10, SamplingParams(max_tokens=None)) == 64


def test_all_of_a_request_must_fit_every_pool_but_for_its_padding_block() -> None:
    found = limits(PAGED, STATE)
    found.check(30, SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match="41 tokens of prompt and output do not fit the KV cache"):
        found.check(30, SamplingParams(max_tokens=11))


def test_a_window_needs_what_it_shows_and_the_chunk_that_is_written() -> None:
    # A window of 5 shows at most 5 tokens in 2 blocks of 4, and one is for padding.
    limits(window(5, 3)).check(50, SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match="do not fit"):
        limits(window(5, 2)).check(50, SamplingParams(max_tokens=10))
    # Chunks of 8 tokens: 5 + 8 + 4 - 3 = 14 tokens lie in up to 5 blocks.
    limits(window(5, 6), multiple=8).check(50, SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match="do not fit"):
        limits(window(5, 5), multiple=8).check(50, SamplingParams(max_tokens=10))


@pytest.mark.parametrize("length", [0, 64, 65])
def test_a_prompt_leaves_room_for_a_token(length: int) -> None:
    with pytest.raises(RequestError, match=f"the prompt has {length} tokens; it must have 1 to 63"):
        limits().check(length, SamplingParams())
    limits().check(63, SamplingParams())


def test_every_continuation_needs_a_row() -> None:
    limits().check(5, SamplingParams(n=3))
    with pytest.raises(RequestError, match="n is 4, but at most 3 sequences run at once"):
        limits().check(5, SamplingParams(n=4))
