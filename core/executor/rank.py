"""One rank: opens a device, loads its share of the model, allocates caches, runs steps. The same in every
executor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.block_manager import BlockCopy
from core.contract.batch import Int32, StepBatch
from core.contract.errors import ConfigError, PluginError, UnsupportedError
from core.contract.interfaces import Communicator
from core.contract.ops import inherited_ops
from core.contract.requests import (
    AllocatorRequest,
    CommunicatorRequest,
    DeviceRequest,
    OpsRequest,
    SamplerRequest,
)
from core.contract.spec import check_capabilities
from core.contract.types import Bucket, SamplingBatch
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget, check_layers
from core.engine.resolve import Facts, Resolution, resolve
from core.models import ModelDefinition, read_config
from core.models.config import ModelConfig, eos_ids
from core.models.fields import check_fields, config_file
from core.parallel.sharding import Shard
from core.parallel.tensor_parallel import TensorParallelOps
from core.plugins import BackendHandle
from core.runner.runner import Runner, StepResult
from core.scheduler import PromptRow
from core.weights.checkpoint import Checkpoint
from core.weights.checks import check_sizes
from core.weights.loader import LoadedModel, Progress, load_model, weight_bytes


@dataclass(frozen=True)
class RankPlace:
    """Which of the model's ranks this is, and where they meet."""

    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""


@dataclass(frozen=True)
class RankReport:
    """What a rank tells after loading: free device bytes, bytes of weights, inherited composites."""

    free_bytes: int
    weight_bytes: int
    inherited: tuple[str, ...]


def read_model(checkpoint: Checkpoint) -> tuple[ModelDefinition, ModelConfig]:
    """The definition and global configuration of a checkpoint.

    Raises:
        ConfigError: an architecture or option that is not known, or values that cannot be.
    """
    model, c = read_config(checkpoint.config(), checkpoint.names(), checkpoint.path)
    ends = dict.fromkeys((*c.eos_token_ids, *_generation_ends(checkpoint.path)))
    c = replace(c, eos_token_ids=tuple(ends))
    check_sizes(c, config_file(checkpoint.path))
    return model, c


def _generation_ends(path: Path) -> tuple[int, ...]:
    """Ids that generation_config.json names as ends: a chat turn often ends by one that is only there.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} cannot be read ({type(e).__name__}: {e}); mend or delete it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not a JSON object; mend or delete it")
    ends = {"eos_token_id": found.get("eos_token_id")}
    check_fields(ends, file)
    return eos_ids(ends)


class RankWorker:
    """One rank's device, model and runner. Open, load, allocate, then submit and wait."""

    def __init__(self, config: EngineConfig, backend: BackendHandle, place: RankPlace) -> None:
        self._config = config
        self._backend = backend
        self._place = place
        self._runner: Runner | None = None
        self._communicator: Communicator | None = None
        self._model: LoadedModel | None = None
        self.device = backend.open_device(
            DeviceRequest(
                index=config.device + place.rank,
                rank=place.rank,
                world_size=place.world_size,
                num_threads=config.num_threads,
                options=config.backend_options,
            )
        )
        try:
            self._allocator = backend.memory_allocator(AllocatorRequest(device=self.device))
        except BaseException:
            self.device.close()
            raise

    def resolve(self, checkpoint: Checkpoint, backend_reason: str) -> Resolution:
        """What the options come to on this rank; reads no weight."""
        spec, shard = self._backend.spec, Shard(self._place.rank, self._place.world_size)
        model, c = read_model(checkpoint)
        local = c.local(shard.world_size)
        if c.moe is not None and not spec.routed_experts:
            raise UnsupportedError(f"backend {spec.name!r} does not declare routed experts; choose another")
        plain = weight_bytes(model, c, "float32", shard)
        has_packed = weight_bytes(model, c, "float32", shard, checkpoint, spec.quantization) < plain
        facts = Facts(
            spec=spec,
            backend_reason=backend_reason,
            model=c,
            layers=lambda dtype: model.cache_layers(local, dtype),
            weight_bytes=lambda dtype: weight_bytes(model, c, dtype, shard),
            memory=self.device.memory(),
            block_bytes=self._allocator.block_bytes,
            packed_bytes=(
                (lambda dtype: weight_bytes(model, c, dtype, shard, checkpoint, spec.quantization))
                if has_packed
                else None
            ),
        )
        found = resolve(self._config, facts)
        check_layers(spec, found.cache.plan.layers)
        check_capabilities(spec, found.cache.plan)
        return found

    def load(
        self, checkpoint: Checkpoint, resolution: Resolution, progress: Progress | None = None
    ) -> RankReport:
        """Join the other ranks and bring this rank's share of the model to the device."""
        place = self._place
        model, c = read_model(checkpoint)
        ops = self._backend.ops(OpsRequest(device=self.device, dtype=resolution.dtype))
        report = inherited_ops(ops)
        if place.world_size > 1:
            self._communicator = self._join()
            ops = TensorParallelOps(ops, self._communicator)
        self._ops = ops
        before = self._allocator.used_bytes()
        self._model = load_model(
            model,
            c,
            checkpoint,
            self._allocator.pack,
            dtype=resolution.dtype,
            max_length=resolution.max_model_len,
            shard=Shard(place.rank, place.world_size),
            schemes=self._backend.spec.quantization if resolution.packed else (),
            progress=progress,
        )
        self._vocab_size = c.vocab_size
        return RankReport(self.device.memory().free_bytes, self._allocator.used_bytes() - before, report)

    def _join(self) -> Communicator:
        place = self._place
        return self._backend.communicator(
            CommunicatorRequest(
                device=self.device,
                group="tp",
                rank=place.rank,
                world_size=place.world_size,
                rendezvous=place.rendezvous,
            )
        )

    def allocate(self, budget: CacheBudget) -> None:
        """Allocate the caches as planned and make the runner."""
        spec = self._backend.spec
        if self._model is None:
            raise PluginError("allocate was called before load")
        sampler = (
            self._backend.sampler(SamplerRequest(device=self.device, vocab_size=self._vocab_size))
            if spec.device_sampler
            else None
        )
        self._runner = Runner(
            compile=self._backend.compile,
            device=self.device,
            allocator=self._allocator,
            ops=self._ops,
            sampler=sampler,
            fn=self._model.fn,
            weights=self._model.weights,
            plan=budget.plan,
            spec=spec,
        )

    @property
    def runner(self) -> Runner:
        """The runner, once caches are allocated."""
        if self._runner is None:
            raise PluginError("the rank's caches are not allocated yet")
        return self._runner

    def close(self) -> None:
        """Give device memory back and leave the group."""
        if self._runner is not None:
            self._runner.close()
        if self._communicator is not None:
            self._communicator.close()
        self.device.close()


HostBuffer = Callable[[int], Int32]


class Executor:
    """What the engine drives: all ranks of a model as one. `InlineExecutor` and `MultiprocessExecutor`
    implement it.
    """

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of the ranks' own processes, in rank order; none where a rank runs in the engine's."""
        return ()

    def resolve(self, backend_reason: str) -> Resolution:
        """What the options come to: of the ranks' answers, that of the smallest cache. Reads no weight."""
        raise NotImplementedError

    def load(self, resolution: Resolution, progress: Progress | None) -> RankReport:
        """Load every rank; the report with the least free memory."""
        raise NotImplementedError

    def allocate(self, budget: CacheBudget) -> None:
        """Allocate every rank's caches with one plan."""
        raise NotImplementedError

    def host_buffer(self, size: int) -> Int32:
        """A buffer for batches, int32 [size]."""
        raise NotImplementedError

    def warm(self, buckets: Sequence[Bucket]) -> None:
        """Compile buckets on every rank."""
        raise NotImplementedError

    def submit(
        self,
        batch: StepBatch,
        sampling: SamplingBatch | None,
        copies: Sequence[BlockCopy],
        prompts: Sequence[PromptRow] = (),
    ) -> None:
        """Queue a step on every rank; without `sampling`, `sample` follows before the next one."""
        raise NotImplementedError

    def sample(self, step_id: int, sampling: SamplingBatch) -> None:
        """Queue the sampling of a step that was submitted without it, on every rank."""
        raise NotImplementedError

    def wait(self, step_id: int) -> StepResult:
        """The first rank's result, once all ranks are done with the step."""
        raise NotImplementedError

    def close(self) -> None:
        """End every rank. Idempotent."""
        raise NotImplementedError
