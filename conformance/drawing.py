"""Draws through a backend's own programs, with parameters that went the engine's way."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conformance.subject import Subject
from core.contract.batch import StepBatch, StepLayout
from core.contract.interfaces import CompileRequest
from core.contract.requests import AllocatorRequest, OpsRequest
from core.contract.types import Bucket, CachePlan, PackRequest, SampledTokens, SamplingBatch
from core.runner.sampling import sampling_batch
from core.sampling import reference
from core.sampling.params import SamplingParams
from core.scheduler.sequence import Request, Sequence, SlotTable

Float32 = npt.NDArray[np.float32]
EOS = 1
PROMPT = (2, 3)


class Draw(NamedTuple):
    """One draw: the parameters and the key. `position` counts prompt and output, so it is at least 2."""

    params: SamplingParams
    seed: int
    position: int = len(PROMPT)
    choice: int = 0


def batch_of(draws: Rows[Draw], vocab_size: int) -> SamplingBatch:
    """What the runner makes of requests with these parameters, each at its position."""
    table = SlotTable(len(draws), len(PROMPT))
    for slot, draw in enumerate(draws):
        draw.params.check_ids(vocab_size, (EOS,))
        request = Request(
            request_id=str(slot), prompt_ids=PROMPT, params=draw.params, eos_ids=(EOS,), seed=draw.seed
        )
        table.open(slot, Sequence(request, draw.choice, (0, 0, 0)), 1 << 30, draw.position)
    return sampling_batch(table, np.arange(len(draws), dtype=np.int32), vocab_size)


def repeated(one: SamplingBatch, n: int, **keys: npt.NDArray[Any]) -> SamplingBatch:
    """A batch of one row, n times; `keys`: seed, position or choice of each."""
    many: dict[str, Any] = {
        f.name: np.repeat(np.asarray(getattr(one, f.name)), n, axis=0)
        for f in fields(one)
        if getattr(one, f.name) is not None and f.name not in ("bias_start", "history")
    }
    if one.bias_start is not None:
        count = int(one.bias_start[-1])
        many |= {"bias_ids": np.tile(one.bias_ids, n), "bias_values": np.tile(one.bias_values, n)}
        many["bias_start"] = (np.arange(n + 1) * count).astype(np.int32)
    return replace(one, **{**many, **keys})


class Drawer:
    """Steps of `rows` requests on a backend, whose logits are rows of a table.

    Args:
        subject: the backend. logits: float32 [K, V].
    """

    def __init__(self, subject: Subject, logits: Float32, rows: int) -> None:
        hooks, device = subject.handle, subject.device
        allocator = hooks.memory_allocator(AllocatorRequest(device=device))
        ops = hooks.ops(OpsRequest(device=device, dtype="float32"))
        self._plan = CachePlan(layers=(), groups=(), group_of=(), max_requests=rows)
        bucket = Bucket(tokens=rows, requests=rows, widths=(), kind="decode", max_query=1, max_seq=1 << 20)
        self._layout = StepLayout.of(bucket, self._plan, subject.spec.batch)
        self._rows = rows
        self._state = allocator.allocate_state(self._plan)
        table = PackRequest(array=logits, uses=("embed",), dtype="float32", name="logits")

        def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
            return ops.take(ops.embed(weights[0], ops.select_tokens(step)), step.sample_rows), caches

        self._program = hooks.compile(
            CompileRequest(
                device=device,
                fn=fn,
                ops=ops,
                weights=(allocator.pack(table),),
                state=self._state,
                layout=self._layout,
                plan=self._plan,
                sampler=None,
                reference_sampler=reference.sample,
            )
        )

    def draw(
        self,
        which: npt.NDArray[np.int32],
        sampling: SamplingBatch,
        sources: npt.NDArray[np.int32] | None = None,
        is_one_call: bool = False,
    ) -> SampledTokens:
        """A token for each of n <= `rows` rows, whose logits are the table's rows `which` [n].

        Args:
            sources: int32 [n]: request slots whose newest token stands in the place of `which`; row i's token
                goes to slot i. is_one_call: run and sample by `run_and_sample`.
        """
        n = len(which)
        flat = np.zeros(self._layout.size, np.int32)
        self._layout.clear(flat)
        views = self._layout.views(flat)
        views["token_ids"][:n] = which
        if sources is not None:
            views["token_source"][:n] = sources
        views["seq_lens"][:n] = 1
        views["request_slots"][:n] = views["sample_rows"][:n] = views["sample_slots"][:n] = np.arange(n)
        views["counts"][:] = n, n, n, n
        batch = StepBatch(0, self._layout, self._plan, flat, n, n, n, n)
        if is_one_call:
            tokens, self._state = self._program.run_and_sample(batch, sampling, self._state)
        else:
            output, self._state = self._program.run(batch, self._state)
            tokens, self._state = self._program.sample(output, batch, sampling, self._state)
        found: SampledTokens = tokens.get()
        return found
