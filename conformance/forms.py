"""The reference backend with attention that reads nothing but a page-table form of `core.contract.derive`.

Kernels of real hardware take the step in a form of their own. Each attention here is written from one form's
docstring: it sees the form, the queries and the cache's blocks, and not the step. A backend made of it serves
models, so a form that lacks something, or has it wrong, gives wrong tokens: `core conformance run --backend
conformance.forms:flat_pages --level L5`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.constraints import CONSTRAINTS, check_step
from conformance.zoo.clone import BASE
from core.contract import derive
from core.contract.batch import DECODE, StepBatch
from core.contract.hookspecs import hookimpl
from core.contract.ops import Ops
from core.contract.spec import AttentionRules, BackendSpec
from core.contract.types import State
from core.plugins import BackendHandle, Plugins

Array = npt.NDArray[Any]
_BATCH: ContextVar[StepBatch] = ContextVar("batch")


@dataclass(frozen=True)
class Row:
    """Queries [first, end) of a step, and the keys [n, K, H] and values of their row, in order."""

    first: int
    end: int
    keys: Array
    values: Array


Rows = Callable[[StepBatch, int, Array, Array], Iterator[Row]]
"""(batch, cache group, keys [B, Z, K, H], values [B, Z, K, Hv]) to the rows, by way of a form."""


def _cumulative(batch: StepBatch, group: int, k: Array, v: Array) -> Iterator[Row]:
    """Packed keys and row pointers: the pages of each row are laid end to end first."""
    form = derive.cumulative_lengths(batch)
    pages = derive.csr_pages(batch, group)
    Z = k.shape[1]
    for r in range(len(form.query_start) - 1):
        count = int(form.key_start[r + 1] - form.key_start[r])
        own = pages.indices[pages.indptr[r] : pages.indptr[r + 1]][: -(-count // Z)]
        yield _row(form.query_start[r], form.query_start[r + 1], k[own], v[own], count)


def _flat_pages(batch: StepBatch, group: int, k: Array, v: Array) -> Iterator[Row]:
    form = derive.flat_pages(batch, group)
    width = form.pages.size // len(form.key_lens)
    for r in range(form.distribution[2]):
        own = form.pages[r * width : (r + 1) * width]
        yield _row(form.query_start[r], form.query_start[r + 1], k[own], v[own], form.key_lens[r])


def _host_lists(batch: StepBatch, group: int, k: Array, v: Array) -> Iterator[Row]:
    form, first = derive.host_lists(batch), 0
    for r, (end, count) in enumerate(zip(form.query_ends, form.key_lens, strict=True)):
        own = batch.block_table(group)[r, : -(-count // k.shape[1])]
        yield _row(first, end, k[own], v[own], count)
        first = end


def _flat_blocks(batch: StepBatch, group: int, k: Array, v: Array) -> Iterator[Row]:
    """Decodes from lists of blocks; prompts from pages."""
    if set(batch.query_kind[: batch.num_requests].tolist()) != {DECODE}:
        yield from _flat_pages(batch, group, k, v)
        return
    form = derive.flat_blocks(batch, group)
    for r in range(batch.bucket.requests):
        own = np.flatnonzero(form.block_groups == r)
        parts = [slice(form.block_first[i], form.block_usage[i]) for i in own]
        blocks = [form.block_list[i] for i in own]
        if blocks:
            keys = np.concatenate([k[b, p] for b, p in zip(blocks, parts, strict=True)])
            values = np.concatenate([v[b, p] for b, p in zip(blocks, parts, strict=True)])
            yield Row(r, r + 1, keys, values)


def _rectangle(batch: StepBatch, group: int, k: Array, v: Array) -> Iterator[Row]:
    """Decodes from a rectangle that is padded on the left; prompts from pages."""
    if set(batch.query_kind[: batch.num_requests].tolist()) != {DECODE}:
        yield from _flat_pages(batch, group, k, v)
        return
    form = derive.left_padded_rectangle(batch, group)
    for r, padding in enumerate(form.left_padding):
        if padding < form.mask.shape[1]:
            keys, values = (x[form.table[r]].reshape(-1, *x.shape[2:]) for x in (k, v))
            yield Row(r, r + 1, keys[form.mask[r]], values[form.mask[r]])


def _row(first: Any, end: Any, k: Array, v: Array, count: Any) -> Row:
    keys, values = (x.reshape(-1, *x.shape[2:])[: int(count)] for x in (k, v))
    return Row(int(first), int(end), keys, values)


def attend(rows: Iterator[Row], q: Array, out: Array, scale: float, window: int | None) -> None:
    """Causal attention of each row's queries, which are the last of its keys, in float64."""
    for row in rows:
        n, count = len(row.keys), row.end - row.first
        for t in range(row.first, row.end):
            last = n - count + (t - row.first) + 1
            first = 0 if window is None else max(0, last - window)
            keys, values = row.keys[first:last].astype(np.float64), row.values[first:last].astype(np.float64)
            N, K = q.shape[1], keys.shape[1]
            for head in range(N):
                scores = scale * (keys[:, head // (N // K)] @ q[t, head].astype(np.float64))
                p = np.exp(scores - scores.max())
                out[t, head] = p @ values[:, head // (N // K)] / p.sum()


class FormBackend:
    """The reference backend under constraints of hardware that takes a form, with attention by the form."""

    def __init__(self, name: str, constraints: str, rows: Rows) -> None:
        self._name, self._constraints, self._rows = name, constraints, rows

    @property
    def _base(self) -> BackendHandle:
        plugins = Plugins(disabled=frozenset())
        plugins.load()
        return plugins.backend(BASE)

    @hookimpl
    def core_backend_spec(self, request: Any) -> BackendSpec:
        spec = CONSTRAINTS[self._constraints].apply(self._base.spec)
        rules = AttentionRules(window=True, max_decode_queries=1)
        summary = f"the reference with attention by {self._name}"
        return replace(spec, name=self._name, attention=rules, determinism="none", summary=summary)

    @hookimpl
    def core_probe(self, request: Any) -> Any:
        found = self._base.probe(request)
        if not isinstance(found, tuple):
            return found
        return [replace(device, backend=self._name) for device in found]

    @hookimpl
    def core_open_device(self, request: Any) -> Any:
        return self._base.open_device(request)

    @hookimpl
    def core_memory_allocator(self, request: Any) -> Any:
        return self._base.memory_allocator(request)

    @hookimpl
    def core_ops(self, request: Any) -> Any:
        base = self._base.ops(request)
        rows = self._rows

        class FormOps(type(base)):  # type: ignore[misc]
            """The reference's ops with another attention."""

            norm_rope_attend = Ops.norm_rope_attend

            def attend(
                self, q: Any, k: Any, v: Any, cache: Any, step: Any, spec: Any, *others: Any, **named: Any
            ) -> Any:
                """See `Ops`. What is not declared is refused before it comes here."""
                if k is not None:
                    cache = cache.write(step, k, v)
                out = np.zeros((*q.shape[:2], spec.v_head_size))
                parts = cache.parts
                found = rows(_BATCH.get(), cache.group, parts["k"], parts["v"])
                attend(found, q, out, spec.scale, spec.window)
                return self._round(out), None, cache

        ops: Ops = FormOps(request.dtype)
        return ops

    @hookimpl
    def core_compile(self, request: Any) -> Any:
        return _Program(self._base.compile(request), self.core_backend_spec(None))


class _Program:
    """A program that puts the host's batch where the attention finds it."""

    def __init__(self, inner: Any, spec: BackendSpec) -> None:
        self._inner, self._spec = inner, spec
        self.warm, self.sample = inner.warm, inner.sample

    def run(self, batch: StepBatch, state: State) -> Any:
        check_step(batch, self._spec)
        token = _BATCH.set(batch)
        try:
            return self._inner.run(batch, state)
        finally:
            _BATCH.reset(token)

    def run_and_sample(self, batch: StepBatch, sampling: Any, state: State) -> Any:
        output, state = self.run(batch, state)
        return self._inner.sample(output, batch, sampling, state)


cumulative_lengths = FormBackend("cumulative_lengths", "mixed", _cumulative)
flat_pages = FormBackend("flat_pages", "static", _flat_pages)
flat_blocks = FormBackend("flat_blocks", "split", _flat_blocks)
host_lists = FormBackend("host_lists", "host-lists", _host_lists)
left_padded_rectangle = FormBackend("left_padded_rectangle", "rectangular", _rectangle)
FORMS = {
    form._name: form
    for form in (cumulative_lengths, flat_pages, flat_blocks, host_lists, left_padded_rectangle)
}
