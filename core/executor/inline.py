"""One rank in the engine's own process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from core.block_manager import BlockCopy
from core.contract.batch import Int32, StepBatch
from core.contract.types import Bucket, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget
from core.engine.resolve import Resolution
from core.executor.rank import Executor, RankPlace, RankReport, RankWorker
from core.plugins import BackendHandle
from core.runner.runner import StepResult
from core.scheduler import PromptRow
from core.weights.checkpoint import open_checkpoint
from core.weights.loader import Progress


class InlineExecutor(Executor):
    """Runs one rank by direct calls."""

    def __init__(self, config: EngineConfig, backend: BackendHandle) -> None:
        self._config = config
        self._worker = RankWorker(config, backend, RankPlace())
        self._closed = False

    def resolve(self, backend_reason: str) -> Resolution:
        """See Executor."""
        with closing(open_checkpoint(self._config.model, self._config.load_format)) as checkpoint:
            return self._worker.resolve(checkpoint, backend_reason)

    def load(self, resolution: Resolution, progress: Progress | None) -> RankReport:
        """See Executor."""
        with closing(open_checkpoint(self._config.model, self._config.load_format)) as checkpoint:
            return self._worker.load(checkpoint, resolution, progress)

    def allocate(self, budget: CacheBudget) -> None:
        """See Executor."""
        self._worker.allocate(budget)

    def host_buffer(self, size: int) -> Int32:
        """See Executor."""
        return self._worker.device.host_buffer(size)

    def warm(self, buckets: Sequence[Bucket]) -> None:
        """See Executor."""
        self._worker.runner.warm(buckets)

    def submit(
        self,
        batch: StepBatch,
        sampling: SamplingBatch | None,
        copies: Sequence[BlockCopy],
        prompts: Sequence[PromptRow] = (),
    ) -> None:
        """See Executor."""
        self._worker.runner.submit(batch, sampling, copies, prompts)

    def sample(self, step_id: int, sampling: SamplingBatch) -> None:
        """See Executor."""
        self._worker.runner.sample(step_id, sampling)

    def wait(self, step_id: int) -> StepResult:
        """See Executor."""
        return self._worker.runner.wait(step_id)

    def close(self) -> None:
        """See Executor."""
        if not self._closed:
            self._closed = True
            self._worker.close()
