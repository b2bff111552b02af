"""The ladder of static shapes: what is padded to which rung, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from core.contract.errors import ConfigError
from core.contract.spec import BackendSpec, BatchRules, ShapeRules
from core.contract.types import Bucket, CacheGroupSpec, CacheLayerSpec, CachePlan, Outputs
from core.runner.buckets import Buckets, powers_of_two

MAX_TOKENS, MAX_LEN = 100, 90


def make(
    shapes: ShapeRules,
    rules: BatchRules | None = None,
    *,
    sizes: tuple[int, ...] = (16,),
    max_requests: int = 6,
    max_tokens: int = MAX_TOKENS,
    max_len: int = MAX_LEN,
) -> Buckets:
    """Buckets over paged groups of these block sizes and one group of state."""
    spec = BackendSpec(
        name="x", contract=(0, 1), summary="x", framework="x", shapes=shapes, batch=rules or BatchRules()
    )
    groups = tuple(
        CacheGroupSpec(kind=kind, layers=(i,), block_size=size, num_blocks=100)  # type: ignore[arg-type]
        for i, (kind, size) in enumerate([*(("paged", size) for size in sizes), ("state", 64)])
    )
    layers = (CacheLayerSpec(kind="paged", dtype="float32"),) * len(groups)
    plan = CachePlan(
        layers=layers, groups=groups, group_of=tuple(range(len(groups))), max_requests=max_requests
    )
    return Buckets(spec, plan, max_tokens, max_len)


def choose(buckets: Buckets, kind: str, tokens: int, rows: int, query: int, context: int) -> Bucket:
    return buckets.choose(kind, tokens, rows, query, context, Outputs())  # type: ignore[arg-type]


DYNAMIC = ShapeRules()
BUCKETED = ShapeRules(kind="bucketed")
DECLARED = ShapeRules(
    kind="static", token_buckets=(24, 48, 100), request_buckets=(4, 32), width_buckets=(2, 3, 8)
)


def test_powers_of_two_reach_the_limit() -> None:
    assert powers_of_two(1) == (1,)
    assert powers_of_two(8) == (1, 2, 4, 8)
    assert powers_of_two(9) == (1, 2, 4, 8, 16)
    assert powers_of_two(100, first=16) == (16, 32, 64, 128)


def test_dynamic_backends_get_exact_counts_and_rungs_of_context_only() -> None:
    bucket = choose(make(DYNAMIC), "mixed", 37, 5, 33, 40)
    assert (bucket.tokens, bucket.requests, bucket.max_query) == (37, 5, 33)
    assert (bucket.max_seq, bucket.widths) == (64, (4, 0))


def test_a_decode_bucket_has_one_token_per_row() -> None:
    for shapes in (DYNAMIC, BUCKETED, DECLARED):
        bucket = choose(make(shapes), "decode", 5, 5, 1, 1)
        assert bucket.tokens == bucket.requests and bucket.max_query == 1


@pytest.mark.parametrize("shapes", [BUCKETED, DECLARED], ids=["own ladder", "declared ladder"])
def test_every_step_gets_the_smallest_rungs_that_hold_it(shapes: ShapeRules) -> None:
    buckets = make(shapes)
    tokens = shapes.token_buckets or powers_of_two(MAX_TOKENS)
    rows = shapes.request_buckets or powers_of_two(6)
    widths = shapes.width_buckets or (1, 2, 4, 6)
    for count, row, context in product((1, 7, 24, 25, 100), (1, 4, 5, 6), (1, 16, 17, 48, 49, MAX_LEN)):
        bucket = choose(buckets, "mixed", count, row, 1, context)
        assert bucket.requests == min(r for r in rows if r >= row)
        assert bucket.tokens == min(t for t in tokens if t >= max(count, bucket.requests))
        assert bucket.widths[0] == min(w for w in widths if w * 16 >= context)
        assert context <= bucket.max_seq <= MAX_LEN
    assert choose(buckets, "mixed", 100, 1, 25, 30).max_query in tokens


def test_the_longest_context_takes_no_more_columns_than_the_model_has_blocks() -> None:
    assert choose(make(BUCKETED), "mixed", 1, 1, 1, 90).widths == (6, 0)
    assert choose(make(DECLARED), "mixed", 1, 1, 1, 90).widths == (8, 0)


def test_each_cache_group_has_a_width_of_its_own_on_the_ladder() -> None:
    buckets = make(replace(DECLARED, width_buckets=(2, 4, 12, 24)), sizes=(16, 8))
    assert choose(buckets, "mixed", 1, 1, 1, 40).widths == (4, 12, 0)
    assert choose(make(BUCKETED, sizes=(16, 8)), "mixed", 1, 1, 1, 40).widths == (4, 8, 0)


def test_more_sampled_rows_than_tokens_stay_on_the_ladder() -> None:
    assert choose(make(DECLARED), "prefill", 1, 5, 1, 1).tokens == 48
    small = make(replace(DECLARED, token_buckets=(4, 16)), max_tokens=16)
    bucket = choose(small, "prefill", 1, 5, 1, 1)
    assert (bucket.tokens, bucket.requests) == (16, 32)


def test_no_padding_beyond_what_the_backend_takes_in_a_step() -> None:
    buckets = make(BUCKETED, BatchRules(max_tokens=100, max_requests=5))
    bucket = choose(buckets, "mixed", 70, 5, 70, 80)
    assert (bucket.tokens, bucket.requests, bucket.max_query) == (100, 5, 100)
    assert {b.requests for b in buckets.warm_up()} == {1, 2, 4, 5}


@pytest.mark.parametrize("shapes", [DYNAMIC, BUCKETED])
def test_decode_steps_are_padded_to_the_rows_that_the_backend_wants_at_least(shapes: ShapeRules) -> None:
    buckets = make(shapes, BatchRules(min_decode_rows=4), max_requests=2)
    assert choose(buckets, "decode", 1, 1, 1, 1).requests == 4
    assert choose(buckets, "mixed", 3, 1, 3, 3).requests == 1
    assert buckets.max_rows == 4


@pytest.mark.parametrize("shapes", [BUCKETED, DECLARED], ids=["own ladder", "declared ladder"])
@pytest.mark.parametrize("least", [1, 3])
def test_warm_up_knows_every_decode_bucket_once(shapes: ShapeRules, least: int) -> None:
    buckets = make(shapes, BatchRules(min_decode_rows=least))
    warm = [bucket for bucket in buckets.warm_up() if bucket.kind == "decode"]
    met = {
        choose(buckets, "decode", rows, rows, 1, context) for rows in range(1, 7) for context in range(1, 91)
    }
    assert set(warm) == met and len(warm) == len(met)
    assert warm == sorted(warm, key=lambda b: (b.requests, b.widths))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("own_ladder", [True, False])
def test_everything_that_a_static_backend_can_meet_is_compiled_beforehand(
    mixed: bool, own_ladder: bool
) -> None:
    shapes = ShapeRules(kind="static") if own_ladder else replace(DECLARED, token_buckets=(4, 24, 48, 100))
    buckets = make(shapes, BatchRules(mixed=mixed))
    known = list(buckets.warm_up())
    met = set()
    for rows, context in product(range(1, 7), (*range(1, 91, 4), 90)):
        met.add(choose(buckets, "decode", rows, rows, 1, context))
        for tokens, query, kind in product(range(1, 101), (1, 3, 50), ("prefill", "mixed")):
            if mixed or kind == "prefill":
                met.add(choose(buckets, kind, tokens, rows, min(query, tokens), context))
    assert met == set(known) and len(known) == len(met)


def test_a_dynamic_backend_is_warmed_up_with_one_shape_and_a_bucketed_one_with_those_of_decoding() -> None:
    assert len(list(make(DYNAMIC).warm_up())) == 1
    assert {bucket.kind for bucket in make(BUCKETED).warm_up()} == {"decode"}


@pytest.mark.parametrize("shapes", [DYNAMIC, BUCKETED, DECLARED])
@pytest.mark.parametrize("least", [1, 9])
def test_no_step_needs_more_room_than_the_largest_bucket_of_its_kind(shapes: ShapeRules, least: int) -> None:
    buckets = make(shapes, BatchRules(min_decode_rows=least))
    decode, mixed = buckets.largest()
    for rows, tokens, context in product((1, 6), (1, 6, 100), (1, 90)):
        for bucket, largest in (
            (choose(buckets, "decode", rows, rows, 1, context), decode),
            (choose(buckets, "mixed", tokens, rows, tokens, context), mixed),
        ):
            assert bucket.tokens <= largest.tokens and bucket.requests <= largest.requests
            assert all(w <= most for w, most in zip(bucket.widths, largest.widths, strict=True))


def test_a_plan_of_states_only_has_no_tables() -> None:
    bucket = choose(make(BUCKETED, sizes=()), "decode", 3, 3, 1, 77)
    assert (bucket.widths, bucket.max_seq) == ((0,), MAX_LEN)


def test_ladders_that_end_below_a_limit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"largest token bucket is 64, but 100 .* lower the limit to 64"):
        make(ShapeRules(kind="static", token_buckets=(64,)))
    with pytest.raises(ConfigError, match=r"largest request bucket is 4, but 6 .* lower the limit to 4"):
        make(ShapeRules(kind="static", request_buckets=(2, 4)))
    with pytest.raises(ConfigError, match=r"5 columns of 16 tokens, .* length is 90; lower it to 80"):
        make(ShapeRules(kind="static", width_buckets=(5,)))
    with pytest.raises(ConfigError, match=r"8 columns of 8 tokens, .* length is 90; lower it to 64"):
        make(ShapeRules(kind="static", width_buckets=(8,)), sizes=(16, 8))


def test_a_step_beyond_the_ladder_is_refused() -> None:
    buckets = make(DECLARED)
    with pytest.raises(ConfigError, match="101 tokens is larger than the largest bucket, 100"):
        choose(buckets, "mixed", 101, 1, 1, 1)
    with pytest.raises(ConfigError, match="33 rows is larger than the largest bucket, 32"):
        choose(buckets, "decode", 33, 33, 1, 1)
    with pytest.raises(ConfigError, match="129 tokens of context is larger than the largest bucket, 128"):
        choose(buckets, "decode", 1, 1, 1, 129)
