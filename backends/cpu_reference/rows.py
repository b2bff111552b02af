"""Which tokens of a step are real, and whose they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.contract.batch import Step


class Row(NamedTuple):
    """A real row: its number and its tokens in this step, and the length of its sequence with them."""

    number: int
    tokens: range
    length: int


def real_rows(step: Step) -> list[Row]:
    """The rows that are not padding. A padded row has length 0."""
    starts, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    return [Row(r, range(starts[r], starts[r + 1]), length) for r, length in enumerate(lengths) if length > 0]


def real_tokens(step: Step) -> npt.NDArray[Any]:
    """Indices of the tokens that are not padding, ascending."""
    return np.array([t for row in real_rows(step) for t in row.tokens], np.int64)
