"""Draws through a backend's own programs, with parameters that went the engine's way."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import fields, replace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
import numpy.typing as npt

from conformance.subject import Subject
from core.contract.batch import StepBatch, StepLayout
from core.contract.errors import ConfigError
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


def _split(logits: Float32, dtype: str) -> dict[str, Float32]:
    """Finite logits [K, V] as a wide product of numbers of a narrow dtype: rows [K, 3K] times columns
    [V, 3K], of whose terms all but three are 0, and those three add up to the logit exactly.
    """
    rest, parts = logits.astype(np.float64), []
    for scale in _SCALES:
        near = (rest / scale).astype(np.dtype(dtype))
        # Towards zero, so that no partial sum is larger than the logit: then each is exact in any order.
        is_over = np.abs(near.astype(np.float64)) > np.abs(rest / scale)
        part = np.where(is_over, np.nextafter(near, np.zeros_like(near)), near).astype(np.float64)
        parts.append(part)
        rest = rest - part * scale
    if not np.isfinite(logits).all() or rest.any():
        raise ConfigError(f"these logits have no exact form in {dtype}; this is a fault of the suite")
    rows = np.kron(np.eye(len(logits)), np.array([_SCALES]))
    columns = np.stack(parts, 1).reshape(-1, logits.shape[1]).T
    return {"rows": rows.astype(np.float32), "columns": columns.astype(np.float32)}


_SCALES = (1.0, 2.0**-7, 2.0**-14)
"""Parts of a logit are kept times these: float16 has no small numbers."""


class Drawer:
    """Steps of `rows` requests on a backend, whose logits are rows of a table.

    Args:
        subject: the backend. logits: float32 [K, V].
    """

    def __init__(self, subject: Subject, logits: Float32, rows: int) -> None:
        hooks, device = subject.handle, subject.device
        allocator = hooks.memory_allocator(AllocatorRequest(device=device))
        dtypes = subject.spec.dtypes
        dtype = "float32" if "float32" in dtypes else dtypes[0]
        ops = hooks.ops(OpsRequest(device=device, dtype=dtype))
        self._plan = CachePlan(layers=(), groups=(), group_of=(), max_requests=rows)
        bucket = Bucket(tokens=rows, requests=rows, widths=(), kind="decode", max_query=1, max_seq=1 << 20)
        self._layout = StepLayout.of(bucket, self._plan, subject.spec.batch)
        self._rows = rows
        self._state = allocator.allocate_state(self._plan)
        arrays = {"rows": logits} if dtype == "float32" else _split(logits, dtype)
        uses = {"rows": ("embed",), "columns": ("linear",)}

        def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
            found = ops.take(ops.embed(weights[0], ops.select_tokens(step)), step.sample_rows)
            return (ops.linear(found, weights[1], wide=True) if weights[1:] else found), caches

        self._program = hooks.compile(
            CompileRequest(
                device=device,
                fn=fn,
                ops=ops,
                weights=tuple(
                    allocator.pack(PackRequest(array=array, uses=uses[name], dtype=dtype, name=name))
                    for name, array in arrays.items()
                ),
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
