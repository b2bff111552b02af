"""One rank in the engine's own process."""

from __future__ import annotations

from collections.abc import Sequence

from core.block_manager import BlockCopy
from core.contract.batch import Int32, StepBatch
from core.contract.types import Bucket, SampledTokens, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget
from core.executor.rank import Executor, RankPlace, RankReport, RankWorker
from core.plugins import BackendHandle
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import Progress


class InlineExecutor(Executor):
    """Runs one rank by direct calls."""

    def __init__(self, config: EngineConfig, backend: BackendHandle, max_model_len: int) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._worker = RankWorker(config, backend, RankPlace())
        self._closed = False

    def load(self, progress: Progress | None) -> RankReport:
        """See Executor."""
        checkpoint = open_checkpoint(self._config.model)
        try:
            return self._worker.load(checkpoint, self._max_model_len, progress)
        finally:
            checkpoint.close()

    def allocate(self, budget_bytes: int, block_size: int, max_model_len: int) -> CacheBudget:
        """See Executor."""
        return self._worker.allocate(budget_bytes, block_size, max_model_len)

    def host_buffer(self, size: int) -> Int32:
        """See Executor."""
        return self._worker.device.host_buffer(size)

    def warm(self, buckets: Sequence[Bucket]) -> None:
        """See Executor."""
        self._worker.runner.warm(buckets)

    def submit(self, batch: StepBatch, sampling: SamplingBatch, copies: Sequence[BlockCopy]) -> None:
        """See Executor."""
        self._worker.runner.submit(batch, sampling, copies)

    def wait(self, step_id: int) -> SampledTokens:
        """See Executor."""
        return self._worker.runner.wait(step_id)

    def close(self) -> None:
        """See Executor."""
        if not self._closed:
            self._closed = True
            self._worker.close()
