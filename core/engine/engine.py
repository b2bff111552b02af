"""The engine: requests in, events out, one step at a time.

`step` keeps up to `overlap` steps in flight: it schedules and submits until that many are, then waits for the
oldest and gives its tokens to the scheduler. A step with a draw that depends on the sequence's earlier output
is submitted too, but sampled only when the tokens before are known, and no step follows it until then.

Everything before the first request (choice of backend, memory plan, loading) happens in `Engine.__init__`, in
that order, so that what cannot work fails before weights are read.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from core.block_manager import BlockManager
from core.contract.batch import StepLayout
from core.contract.errors import ConfigError, EngineDead, RequestError, UnsupportedError
from core.contract.requests import ObserverRequest
from core.contract.spec import BackendSpec, check_capabilities
from core.engine.config import EngineConfig
from core.engine.memory import CacheBudget, block_groups, check_layers
from core.engine.metrics import EngineMetrics
from core.engine.observers import Observers
from core.engine.resolve import Resolution, choose_dtype
from core.engine.trace import StepTrace, decision
from core.env import debug_level
from core.executor.inline import InlineExecutor
from core.executor.multiprocess import MultiprocessExecutor
from core.executor.rank import Executor, read_model
from core.models.config import ModelConfig
from core.plugins import BackendHandle, Plugins, Selection
from core.runner.buckets import Buckets
from core.runner.builder import BatchBuilder
from core.sampling.params import SamplingParams
from core.scheduler import Event, Request, Scheduler, SchedulerConfig, StepPlan
from core.weights.checkpoint import Checkpoint, open_checkpoint
from core.weights.checks import check_checkpoint
from core.weights.loader import Progress
from core.weights.verify import verify_values

_LOGIT_BYTES = 128 * 2**20
"""Logits, in float32 on the host, of a step of which those of all tokens are wanted, at most."""


@dataclass(frozen=True)
class _Opened:
    """A backend chosen, the model checked against it, its ranks open; nothing is loaded."""

    backend: BackendHandle
    reason: str
    model: ModelConfig
    executor: Executor
    observers: Observers
    verify: Callable[[Progress | None], None]


def _open(config: EngineConfig, plugins: Plugins | None) -> _Opened:
    if plugins is None:
        plugins = Plugins()
        plugins.load()
    selection = plugins.select(config.backend)
    spec = selection.spec
    _check_ranks(config, spec)
    _check_device(config, selection)
    with _checkpoint(config) as checkpoint:
        definition, model = read_model(checkpoint)
        dtype, _ = choose_dtype(spec, config.dtype, model.dtype)
        local = model.local(config.tensor_parallel)
        check_layers(spec, definition.cache_layers(local, dtype))
        for record in definition.attention_specs(local):
            check_capabilities(spec, record)
        check_checkpoint(definition, model, checkpoint)
    kind = MultiprocessExecutor if config.tensor_parallel > 1 else InlineExecutor
    backend = plugins.backend(spec.name)
    observers = Observers(plugins.observers(ObserverRequest(engine=config.model.name)))

    def verify(progress: Progress | None) -> None:
        with _checkpoint(config) as checkpoint:
            verify_values(definition, model, checkpoint, progress)

    return _Opened(backend, selection.reason, model, kind(config, backend), observers, verify)


def _checkpoint(config: EngineConfig) -> closing[Checkpoint]:
    return closing(open_checkpoint(config.model, config.load_format))


def _check_ranks(config: EngineConfig, spec: BackendSpec) -> None:
    ranks = config.tensor_parallel
    if ranks > spec.max_world_size:
        raise UnsupportedError(
            f"tensor_parallel is {ranks}, but backend {spec.name!r} runs {spec.max_world_size} ranks at most"
        )
    if ranks > 1 and spec.process_model != "per_device":
        raise UnsupportedError(
            f"tensor_parallel is {ranks}, but backend {spec.name!r} drives all devices from one process, "
            "which this version of core does not do; use 1"
        )
    missing = {"all_reduce", "all_gather"} - set(spec.collectives)
    if ranks > 1 and missing:
        raise UnsupportedError(
            f"tensor_parallel is {ranks}, but backend {spec.name!r} does not declare "
            f"{', '.join(sorted(missing))}; use 1"
        )


def _check_device(config: EngineConfig, selection: Selection) -> None:
    """Ranks run on devices that follow each other, or all on the only one.

    Raises:
        ConfigError: the probe found none of such an index.
    """
    found = {device.index: device.name for device in selection.devices}
    last = config.device + (config.tensor_parallel - 1 if len(found) > 1 else 0)
    missing = [index for index in range(config.device, last + 1) if index not in found]
    if missing:
        listed = ", ".join(f"{index} ({name})" for index, name in found.items())
        ranks = f" and tensor_parallel {config.tensor_parallel}" if last > config.device else ""
        raise ConfigError(
            f"device is {config.device}{ranks}, but backend {selection.spec.name!r} has no device "
            f"{missing[0]}; it has {listed}: choose among those"
        )


def explain(config: EngineConfig, *, plugins: Plugins | None = None) -> Resolution:
    """What an engine with these options would decide, and why. Opens the device, but loads nothing.

    Raises:
        CoreError: it could not start.
    """
    opened = _open(config, plugins)
    try:
        return opened.executor.resolve(opened.reason)
    finally:
        opened.executor.close()


class Engine:
    """One model on one backend. One thread uses it.

    Attributes:
        resolution: what was decided for each option, and why.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        plugins: Plugins | None = None,
        progress: Progress | None = None,
        on_resolved: Callable[[Resolution], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start.

        Args:
            progress: told how far loading is. on_resolved: told the decisions before loading.

        Raises:
            CoreError: what cannot work; before weights are read, where it can be known then.
        """
        self.config = config
        self._dead: BaseException | None = None
        opened = _open(config, plugins)
        self.backend, self.choice_reason, self.model = opened.backend, opened.reason, opened.model
        self._executor, self._observers = opened.executor, opened.observers
        try:
            self.resolution = self._executor.resolve(self.choice_reason)
            for choice in self.resolution.choices:
                decision(f"{choice.option} = {choice.value}: {choice.why}")
            decision(self.resolution.summary())
            if on_resolved is not None:
                on_resolved(self.resolution)
            opened.verify(progress)
            self._start(progress, clock)
        except BaseException:
            self._executor.close()
            raise

    @property
    def cache(self) -> CacheBudget:
        """The caches, and what they hold."""
        return self.resolution.cache

    @property
    def dtype(self) -> str:
        """The compute dtype."""
        return self.resolution.dtype

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output of a sequence at most."""
        return self.resolution.max_model_len

    def _start(self, progress: Progress | None, clock: Callable[[], float]) -> None:
        config, spec = self.config, self.backend.spec
        self.report = self._executor.load(self.resolution, progress)
        self._executor.allocate(self.cache)
        plan = self.cache.plan
        self.blocks = BlockManager(
            block_groups(plan),
            max_requests=plan.max_requests,
            max_model_len=self.max_model_len,
            enable_prefix_cache=config.prefix_cache,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_requests=plan.max_requests,
                max_model_len=self.max_model_len,
                max_batch_tokens=self.resolution.max_batch_tokens,
                max_waiting=config.max_waiting,
                max_logit_tokens=max(
                    _LOGIT_BYTES // (4 * self.model.vocab_size),
                    plan.max_requests + spec.batch.prefill_multiple,
                ),
                policy=config.policy,
            ),
            spec.batch,
            self.blocks,
            clock,
        )
        self._clock = clock
        self._trace = StepTrace() if debug_level() >= 3 else None
        self._overlap = self.resolution.overlap
        self._unsampled: StepPlan | None = None
        buckets = Buckets(spec, plan, self.resolution.max_batch_tokens, self.max_model_len)
        size = max(StepLayout.of(b, plan, spec.batch).size for b in buckets.largest())
        buffers = [self._executor.host_buffer(size) for _ in range(self._overlap + 1)]
        self._builder = BatchBuilder(
            plan, spec.batch, buckets, self.scheduler.table, self.blocks, buffers, self.model.vocab_size
        )
        beforehand = list(buckets.warm_up()) if config.warm_up or spec.shapes.kind == "static" else []
        decision(f"{len(beforehand)} programs compiled beforehand; {spec.shapes.kind} shapes")
        decision(f"ops that run as composites: {', '.join(self.report.inherited) or 'none'}")
        if beforehand:
            self._executor.warm(beforehand)

    def add(
        self,
        request_id: str,
        prompt_ids: list[int] | tuple[int, ...],
        params: SamplingParams,
        *,
        priority: int = 0,
        queue_timeout_s: float | None = None,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> Request:
        """Queue a request.

        Raises:
            RequestError: it can never run, or the queue is full; nothing was queued. EngineDead.
        """
        self._check_alive()
        self.resolution.check_ids(prompt_ids, params)
        if not -(2**31) <= priority < 2**31:
            raise RequestError(f"priority is {priority}; it must be in [-2^31, 2^31)")
        if params.prompt_logprobs is not None:
            if self.backend.spec.shapes.kind == "static":
                raise RequestError(
                    "prompt_logprobs needs the logits of all tokens, for which backend "
                    f"{self.backend.name!r} has no compiled shape; leave it out"
                )
            # A cached prefix has no logits, so such a request shares with nobody.
            salt = f"{salt}\0{secrets.token_hex(16)}"
        now = self._clock()
        request = Request(
            request_id=request_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            eos_ids=self.model.eos_token_ids,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            priority=priority,
            arrival=now,
            queue_deadline=None if queue_timeout_s is None else now + queue_timeout_s,
            deadline=None if timeout_s is None else now + timeout_s,
            salt=salt,
        )
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> bool:
        """End a request; False where it is not running or waiting."""
        return self.scheduler.abort(request_id)

    def end_choice(self, request_id: str, choice: int) -> None:
        """End one continuation because its text reached a stop text: its reason is "stop"."""
        self.scheduler.finish_choice(request_id, choice, "stop")

    @property
    def rank_processes(self) -> tuple[int, ...]:
        """Ids of the ranks' own processes, in rank order; none where the only rank runs in this one."""
        return self._executor.processes

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or report anything."""
        return self.scheduler.has_work

    def step(self) -> list[Event]:
        """Fill the pipeline, wait for its oldest step, and return what happened.

        Raises:
            EngineDead: the device failed, now or before.
        """
        self._check_alive()
        try:
            self._fill()
            oldest = self.scheduler.oldest_step
            if oldest is None:
                return self.scheduler.take_events()
            result = self._executor.wait(oldest)
            sampled = result.sampled
            if self._trace is not None:
                self._trace.result(oldest, sampled)
            events = self.scheduler.update(oldest, sampled.tokens, sampled, result.prompts)
            self._sample_late()
            self._observers.step_done(oldest, events)
            return events
        except Exception as error:
            self._dead = error
            raise EngineDead(f"the engine stopped: {error}") from error

    def _fill(self) -> None:
        self._sample_late()
        while self._unsampled is None and self.scheduler.num_in_flight < self._overlap:
            with self._whole():
                plan = self.scheduler.schedule()
                if plan is None:
                    return
                batch = self._builder.build(plan)
                if self._trace is not None:
                    self._trace.batch(batch, plan)
                self._observers.step_begun(plan)
                sampling = self._builder.sampling(plan) if self._builder.is_known(plan) else None
                self._executor.submit(batch, sampling, plan.copies, plan.prompts)
                self._unsampled = plan if sampling is None else None

    def _sample_late(self) -> None:
        """Sample the step that waits for the tokens before its own, once they are known."""
        plan = self._unsampled
        if plan is not None and self._builder.is_known(plan):
            with self._whole():
                self._executor.sample(plan.step_id, self._builder.sampling(plan))
                self._unsampled = None

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What an interrupt must not leave half done: what was scheduled and what was submitted would differ.
        A wait can be taken up again.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._dead = EngineDead("it was interrupted while a step was being submitted")
            raise

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(f"the engine stopped earlier: {self._dead}; make a new one") from self._dead

    def metrics(self) -> EngineMetrics:
        """Figures of now."""
        blocks, counters = self.blocks.metrics(), self.scheduler.counters
        return EngineMetrics(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            steps=counters.steps,
            scheduled_tokens=counters.scheduled_tokens,
            cached_tokens=counters.cached_tokens,
            preemptions=counters.preemptions,
            blocks_total=blocks.total,
            blocks_used=blocks.used,
            blocks_shared=blocks.shared,
            blocks_cached=blocks.cached,
            prefix_query_tokens=blocks.query_tokens,
            prefix_hit_tokens=blocks.hit_tokens,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            finished=dict(counters.finished),
        )

    def close(self) -> None:
        """End the engine; unfinished requests are dropped. Idempotent."""
        self._dead = self._dead or EngineDead("the engine was closed")
        self._executor.close()
