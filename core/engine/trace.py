"""For people, on standard error: decisions at CORE_DEBUG=1, and at CORE_DEBUG=3 what each step was given and
gave.

A step's lines are JSON and hold the whole StepBatch without its padding, so a bug report can carry them.
"""

from __future__ import annotations

import json
import sys
from typing import TextIO

from core.contract.batch import StepBatch
from core.contract.types import SampledTokens
from core.env import debug_level
from core.scheduler import StepPlan

_TOKENS = ("token_ids", "token_source", "positions", "row_of_token")
_SAMPLES = ("sample_rows", "sample_slots")


def decision(text: str) -> None:
    """Say what was decided, and why, where the user wants to know."""
    if debug_level() >= 1:
        sys.stderr.write(f"core: {text}\n")


class StepTrace:
    """Writes batches and results to a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def batch(self, batch: StepBatch, plan: StepPlan) -> None:
        """A step that was just built."""
        T, R, S = batch.num_tokens, batch.num_requests, batch.num_samples
        bucket = batch.bucket
        fields: dict[str, object] = {
            "step": batch.step_id,
            "bucket": [bucket.kind, bucket.tokens, bucket.requests, list(bucket.widths)],
            "copies": [[c.group, c.src, c.dst] for c in plan.copies],
        }
        for name, view in batch.views.items():
            kind = name.split(".")[0]
            count = T if kind in _TOKENS or kind == "slots" else S if kind in _SAMPLES else R
            count += kind == "query_start"
            fields[name] = view.tolist() if kind == "counts" else view[:count].tolist()
        self._write(fields)

    def result(self, step_id: int, tokens: SampledTokens) -> None:
        """A step that was just waited for."""
        self._write({"step": step_id, "tokens": tokens.tokens.tolist()})

    def _write(self, fields: dict[str, object]) -> None:
        self._stream.write(f"core: {json.dumps(fields)}\n")
