"""Every page-table form carries all that attention needs: a kernel that reads nothing else is right.

Each kernel below is written from its form's docstring alone, over a paged cache whose pad block and unused
slots hold NaN, so that reading one entry too many shows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.contract import derive
from core.contract.batch import DECODE, PREFILL, VERIFY, StepBatch, StepLayout
from core.contract.spec import BatchRules
from core.contract.types import Bucket, CacheGroupSpec, CacheLayerSpec, CachePlan

HEAD = 4
Float = npt.NDArray[np.float64]
SEEDS = range(12)


class Case:
    """A random step: batch, queries [T, H], caches [blocks, Z, H] of keys and values, the wanted output."""

    def __init__(self, seed: int, kinds: tuple[int, ...], window: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.Z = int(rng.choice([1, 2, 4, 8]))
        counts = [1 if kind == DECODE else int(rng.integers(2, 9)) for kind in kinds]
        lens = [count + int(rng.integers(0, 20)) for count in counts]
        if len(kinds) == 1 or rng.integers(2):
            lens[-1] = -(-lens[-1] // self.Z) * self.Z  # a last block that is just full
        is_decode = set(kinds) == {DECODE}
        T, R = sum(counts), len(kinds) + int(rng.integers(0, 3))
        width = max(-(-n // self.Z) for n in lens) + int(rng.integers(0, 2))
        self.plan = make_plan(self.Z, 1 + sum(-(-n // self.Z) for n in lens) + 3, window)
        bucket = Bucket(
            tokens=R if is_decode else T + int(rng.integers(0, 4)),
            requests=R,
            widths=(width,),
            kind="decode" if is_decode else "mixed",
            max_query=max(counts),
            max_seq=width * self.Z,
        )
        layout = StepLayout.of(bucket, self.plan, BatchRules())
        flat = np.zeros(layout.size, np.int32)
        layout.clear(flat)
        self.batch = StepBatch(0, layout, self.plan, flat, T, len(kinds), kinds.count(DECODE), len(kinds))
        self.scale = 0.7
        self.q: Float = rng.standard_normal((bucket.tokens, HEAD))
        blocks = self.plan.groups[0].num_blocks
        self.k: Float = np.full((blocks, self.Z, HEAD), np.nan)
        self.v: Float = np.full((blocks, self.Z, HEAD), np.nan)
        self.wanted: Float = np.zeros((T, HEAD))
        free = list(rng.permutation(np.arange(1, blocks)))
        at = 0
        for r, (kind, count, length) in enumerate(zip(kinds, counts, lens, strict=True)):
            table = [int(free.pop()) for _ in range(-(-length // self.Z))]
            keys, values = rng.standard_normal((2, length, HEAD))
            positions = np.arange(length - count, length)
            self._write(table, keys, values, window, length)
            self._fill(r, kind, at, count, length, table)
            for t, p in enumerate(positions):
                low = 0 if window is None else max(0, p - window + 1)
                self.wanted[at + t] = softmax_sum(self.q[at + t], keys[low : p + 1], values[low : p + 1])
            at += count
        if not is_decode:
            self.batch.query_start[len(kinds) :] = T

    def _write(self, table: list[int], keys: Float, values: Float, window: int | None, length: int) -> None:
        for j in range(length):
            self.k[table[j // self.Z], j % self.Z] = keys[j]
            self.v[table[j // self.Z], j % self.Z] = values[j]
        if window is not None:  # blocks that the window left were given back
            for column in range(max(0, length - window) // self.Z):
                self.k[table[column]] = self.v[table[column]] = np.nan
                table[column] = 0

    def _fill(self, r: int, kind: int, at: int, count: int, length: int, table: list[int]) -> None:
        b = self.batch
        b.query_start[r : r + 2] = (at, at + count)
        b.row_of_token[at : at + count] = r
        b.positions[at : at + count] = np.arange(length - count, length)
        b.seq_lens[r] = length
        b.query_kind[r] = kind
        b.block_table(0)[r, : len(table)] = table


def make_plan(block_size: int, num_blocks: int, window: int | None) -> CachePlan:
    kind = "paged" if window is None else "window"
    layer = CacheLayerSpec(
        kind=kind, dtype="float64", num_kv_heads=1, head_size=HEAD, v_head_size=HEAD, window=window
    )
    group = CacheGroupSpec(
        kind=kind, layers=(0,), block_size=block_size, num_blocks=num_blocks, window=window
    )
    return CachePlan(layers=(layer,), groups=(group,), group_of=(0,), max_requests=8)


def softmax_sum(q: Float, keys: Float, values: Float, scale: float = 0.7) -> Float:
    scores = keys @ q * scale
    p = np.exp(scores - scores.max())
    return p @ values / p.sum()


def decodes(seed: int) -> tuple[int, ...]:
    return (DECODE,) * int(np.random.default_rng(seed).integers(1, 6))


def mixed(seed: int) -> tuple[int, ...]:
    rng = np.random.default_rng(seed)
    return (
        *decodes(seed),
        *(int(k) for k in np.sort(rng.choice([VERIFY, PREFILL], int(rng.integers(1, 4))))),
    )


def causal_rows(case: Case, query_start: npt.NDArray[np.int32], row_keys: list[tuple[Float, Float]]) -> Float:
    """Causal attention of rows whose queries are the last ones of their keys."""
    out = np.zeros_like(case.wanted)
    for r, (keys, values) in enumerate(row_keys):
        a, b = int(query_start[r]), int(query_start[r + 1])
        for t in range(a, b):
            seen = len(keys) - (b - a) + (t - a) + 1
            out[t] = softmax_sum(case.q[t], keys[:seen], values[:seen])
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_rows_attend_by_cumulative_lengths_alone(seed: int) -> None:
    case = Case(seed, mixed(seed))
    form = derive.cumulative_lengths(case.batch)
    packed_k, packed_v = packed(case)
    starts = form.key_start
    rows = [
        (packed_k[starts[r] : starts[r + 1]], packed_v[starts[r] : starts[r + 1]])
        for r in range(case.batch.bucket.requests)
    ]
    np.testing.assert_allclose(causal_rows(case, form.query_start, rows), case.wanted, rtol=1e-12)
    assert form.max_query == np.diff(form.query_start).max()
    assert form.max_keys == np.diff(form.key_start).max()
    assert form.query_start.shape == form.key_start.shape == (case.batch.bucket.requests + 1,)


def packed(case: Case) -> tuple[Float, Float]:
    """Keys and values of all rows laid end to end, as a model without a cache has them."""
    b, Z = case.batch, case.Z
    parts = [
        b.block_table(0)[r, np.arange(b.seq_lens[r]) // Z] * Z + np.arange(b.seq_lens[r]) % Z
        for r in range(b.num_requests)
    ]
    slots = np.concatenate(parts)
    return case.k.reshape(-1, HEAD)[slots], case.v.reshape(-1, HEAD)[slots]


@pytest.mark.parametrize("seed", SEEDS)
def test_csr_pages_alone_are_enough(seed: int) -> None:
    case = Case(seed, mixed(seed))
    form = derive.csr_pages(case.batch, 0)
    rows = []
    for r in range(len(form.last_len)):
        pages = form.indices[form.indptr[r] : form.indptr[r + 1]]
        count = (len(pages) - 1) * case.Z + int(form.last_len[r]) if len(pages) else 0
        rows.append((case.k[pages].reshape(-1, HEAD)[:count], case.v[pages].reshape(-1, HEAD)[:count]))
    np.testing.assert_allclose(causal_rows(case, form.query_start, rows), case.wanted, rtol=1e-12)
    R = case.batch.num_requests
    assert ((form.last_len[:R] >= 1) & (form.last_len[:R] <= case.Z)).all()
    assert not form.last_len[R:].any() and not form.indices[form.indptr[-1] :].any()
    assert form.indices.size == case.batch.block_table(0).size


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_flat_blocks_alone_are_enough_for_decode(seed: int, window: int | None) -> None:
    case = Case(seed, decodes(seed), window)
    form = derive.flat_blocks(case.batch, 0)
    R = case.batch.bucket.requests
    top, total, out = np.full(R, -np.inf), np.zeros(R), np.zeros((R, HEAD))
    for block, row, first, end in zip(
        form.block_list, form.block_groups, form.block_first, form.block_usage, strict=True
    ):
        if row < 0:
            assert block == 0 and end > first
            continue
        scores = case.k[block, first:end] @ case.q[row] * case.scale
        new_top = max(top[row], scores.max())
        p, keep = np.exp(scores - new_top), np.exp(top[row] - new_top)
        total[row] = total[row] * keep + p.sum()
        out[row] = out[row] * keep + p @ case.v[block, first:end]
        top[row] = new_top
    n = case.batch.num_requests
    np.testing.assert_allclose(out[:n] / total[:n, None], case.wanted, rtol=1e-12)
    assert not total[n:].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_host_lists_alone_are_enough_with_the_table(seed: int) -> None:
    case = Case(seed, mixed(seed))
    form = derive.host_lists(case.batch)
    assert all(type(n) is int for n in (*form.query_ends, *form.key_lens))
    rows = []
    for r, length in enumerate(form.key_lens):
        table = case.batch.block_table(0)[r]
        slots = [int(table[j // case.Z]) * case.Z + j % case.Z for j in range(length)]
        rows.append((case.k.reshape(-1, HEAD)[slots], case.v.reshape(-1, HEAD)[slots]))
    starts = np.array([0, *form.query_ends], np.int32)
    np.testing.assert_allclose(causal_rows(case, starts, rows), case.wanted, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_flat_pages_alone_are_enough(seed: int) -> None:
    case = Case(seed, mixed(seed))
    form = derive.flat_pages(case.batch, 0)
    R = len(form.key_lens)
    width = form.pages.size // R
    rows = []
    for r in range(form.distribution[2]):
        pages = form.pages[r * width : (r + 1) * width]
        count = form.key_lens[r]
        rows.append((case.k[pages].reshape(-1, HEAD)[:count], case.v[pages].reshape(-1, HEAD)[:count]))
    np.testing.assert_allclose(causal_rows(case, form.query_start, rows), case.wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ((DECODE, DECODE), [2, 2, 2]),
        ((DECODE, PREFILL, PREFILL), [1, 3, 3]),
        ((PREFILL,), [0, 1, 1]),
        ((DECODE, VERIFY, PREFILL), [1, 1, 3]),
        ((VERIFY,), [0, 0, 1]),
    ],
)
def test_distribution_ends_runs_of_decode_prefill_and_any_rows(
    kinds: tuple[int, ...], runs: list[int]
) -> None:
    assert derive.flat_pages(Case(3, kinds).batch, 0).distribution.tolist() == runs


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_left_padded_rectangle_alone_is_enough_for_decode(
    seed: int, window: int | None, extra: int
) -> None:
    case = Case(seed, decodes(seed), window)
    form = derive.left_padded_rectangle(case.batch, 0)
    if extra:
        form = derive.left_padded_rectangle(case.batch, 0, form.table.shape[1] + extra)
    n = case.batch.num_requests
    out = np.zeros((n, HEAD))
    for r in range(n):
        keys, values = (x[form.table[r]].reshape(-1, HEAD)[form.mask[r]] for x in (case.k, case.v))
        out[r] = softmax_sum(case.q[r], keys, values)
        sequence = form.positions[r] - form.left_padding[r]
        assert sequence == case.batch.positions[r], "positions and left_padding place the query in its row"
    np.testing.assert_allclose(out, case.wanted, rtol=1e-12)
    assert (form.left_padding % case.Z == 0).all(), "padding is whole blocks"
    assert form.mask.any(1).all(), "no softmax is empty, in padded rows neither"
    assert form.mask.shape == (case.batch.bucket.requests, form.table.shape[1] * case.Z)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_padded_rectangle_alone_is_enough_with_context_from_its_table(seed: int, extra: int) -> None:
    case = Case(seed, mixed(seed))
    b = case.batch
    b.slots(0)[: b.num_tokens] = [
        b.block_table(0)[r, p // case.Z] * case.Z + p % case.Z
        for r, p in zip(b.row_of_token[: b.num_tokens], b.positions[: b.num_tokens], strict=True)
    ]
    form = derive.right_padded_rectangle(b, 0, b.bucket.max_query + extra if extra else None)
    R, S = b.bucket.requests, b.bucket.max_query + extra
    assert form.tokens.shape == form.slots.shape == (R, S)
    k, v = case.k.reshape(-1, HEAD), case.v.reshape(-1, HEAD)
    out = np.full_like(case.wanted, np.nan)
    for r in range(R):
        n, context = int(form.query_lens[r]), int(form.context_lens[r])
        old = form.table[r, np.arange(context) // case.Z] * case.Z + np.arange(context) % case.Z
        keys = np.concatenate([old, form.slots[r, :n]])
        for i, token in enumerate(form.tokens[r, :n]):
            seen = keys[: context + i + 1]
            out[token] = softmax_sum(case.q[token], k[seen], v[seen])
        assert (form.tokens[r, n:] == -1).all() and not form.slots[r, n:].any()
    np.testing.assert_allclose(out, case.wanted, rtol=1e-12)
    assert not form.query_lens[b.num_requests :].any() and not form.context_lens[b.num_requests :].any()


def test_a_right_padded_rectangle_refuses_a_length_that_loses_queries() -> None:
    with pytest.raises(ValueError, match="raise it"):
        derive.right_padded_rectangle(Case(0, (DECODE, PREFILL)).batch, 0, 1)


@pytest.mark.parametrize("form", [derive.flat_blocks, derive.left_padded_rectangle])
def test_a_decode_form_refuses_rows_of_several_queries(form: type) -> None:
    with pytest.raises(ValueError, match="serves rows of one query"):
        form(Case(0, (DECODE, PREFILL)).batch, 0)


@pytest.mark.parametrize("form", [derive.flat_blocks, derive.left_padded_rectangle])
def test_a_form_refuses_a_size_that_loses_blocks(form: type) -> None:
    with pytest.raises(ValueError, match="raise it"):
        form(Case(5, (DECODE,) * 4).batch, 0, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_forms_share_no_memory_with_the_batch(seed: int) -> None:
    batch = Case(seed, decodes(seed)).batch
    before = batch.flat.copy()
    for form in (
        derive.cumulative_lengths(batch),
        derive.csr_pages(batch, 0),
        derive.flat_blocks(batch, 0),
        derive.flat_pages(batch, 0),
        derive.right_padded_rectangle(batch, 0),
        derive.left_padded_rectangle(batch, 0),
    ):
        for value in vars(form).values():
            if isinstance(value, np.ndarray):
                assert value.dtype in (np.int32, np.bool_)
                value[...] = 1
    np.testing.assert_array_equal(batch.flat, before)
