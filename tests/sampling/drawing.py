"""The suite's drawer, by a backend's name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from conformance.drawing import EOS, Draw, batch_of, repeated
from conformance.drawing import Drawer as _Drawer
from core.contract.types import SampledTokens, SamplingBatch
from tests.backends.harness import subject_of

__all__ = ["EOS", "Draw", "Drawer", "batch_of", "repeated"]


class Drawer(_Drawer):
    """Steps of `rows` requests on a backend, whose logits are rows of a table."""

    def __init__(self, backend: str, logits: npt.NDArray[np.float32], rows: int) -> None:
        super().__init__(subject_of(backend), logits, rows)

    def draw(self, which: npt.NDArray[np.int32], sampling: SamplingBatch) -> SampledTokens:
        """As the suite's; `last` must hold what was drawn."""
        found = super().draw(which, sampling)
        assert np.array_equal(np.asarray(self._state.last)[: len(which)], found.tokens)
        return found
