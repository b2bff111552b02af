"""From options to decisions: one pure function, which gives a reason for each.

It runs before any weight is read: what the cache's budget buys is known, and told, before loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from core.contract.errors import ConfigError, RequestError, UnsupportedError
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec, MemoryInfo
from core.engine.config import EngineConfig
from core.engine.memory import BlockBytes, CacheBudget, block_groups, choose_block_size, plan_cache
from core.models.config import ModelConfig
from core.sampling.params import SamplingParams
from core.scheduler import Limits

_KV_SHARE = 0.6
"""Share of the memory that weights leave free which a KV cache takes where no budget was given."""

_ROOM = 0.2
"""Share of the free memory that dequantized weights must leave, where the KV cache has no size of its own."""

_USUAL_LENGTH = 8192
"""A longer maximum length is taken only where it is asked for: it costs memory at every start."""

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a decision goes by; known without reading a weight.

    Attributes:
        backend_reason: why this backend was chosen.
        layers: cache layers of a rank, by dtype. weight_bytes: device bytes of a rank's weights, by dtype.
        packed_bytes: the same with quantized weights as they are; None where there are none, or the backend
            keeps none of their schemes.
        memory: of the rank's device, now. block_bytes: as the backend's allocator tells it.
    """

    spec: BackendSpec
    backend_reason: str
    model: ModelConfig
    layers: Callable[[str], tuple[CacheLayerSpec, ...]]
    weight_bytes: Callable[[str], int]
    memory: MemoryInfo
    block_bytes: BlockBytes
    packed_bytes: Callable[[str], int] | None = None


@dataclass(frozen=True)
class Choice:
    """One option, its value as text, and why."""

    option: str
    value: str
    why: str


@dataclass(frozen=True)
class Resolution:
    """Every decision of an engine's start.

    Attributes:
        packed: quantized weights stay as they are.
        weight_bytes: estimate of a rank's weights on the device. choices: one per option, in their order.
        vocab_size, eos_token_ids: the model's. prefill_multiple: the backend's.
    """

    dtype: str
    packed: bool
    max_model_len: int
    max_requests: int
    max_batch_tokens: int
    block_size: int
    overlap: int
    weight_bytes: int
    cache: CacheBudget
    choices: tuple[Choice, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefill_multiple: int

    @property
    def limits(self) -> Limits:
        """What a request may ask for, by its size."""
        return Limits(
            max_model_len=self.max_model_len,
            max_rows=self.max_requests,
            prefill_multiple=self.prefill_multiple,
            groups=block_groups(self.cache.plan),
        )

    def check_ids(self, prompt_ids: Iterable[int], params: SamplingParams) -> None:
        """Hold a prompt, and what parameters say of ids, against the vocabulary.

        Raises:
            RequestError: an id is outside it, or no id is left that may be drawn.
        """
        wrong = next((i for i in prompt_ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"prompt token id {wrong} is outside the vocabulary of {self.vocab_size} ids")
        params.check_ids(self.vocab_size, self.eos_token_ids)

    def summary(self) -> str:
        """What the memory buys, in one sentence."""
        c = self.cache
        return (
            f"{self.weight_bytes / _MIB:.0f} MiB of {'packed' if self.packed else self.dtype} weights; KV "
            f"cache of {c.num_bytes / _MIB:.0f} MiB: {c.num_tokens // self.block_size} blocks of "
            f"{self.block_size} = {c.num_tokens} tokens, {c.full_requests:.1f} requests of "
            f"{self.max_model_len} tokens at once"
        )


def resolve(config: EngineConfig, facts: Facts) -> Resolution:
    """Decide every option that was not given.

    Raises:
        UnsupportedError: the backend does not compute in the dtype, or not with the block size.
        ConfigError: longer than the model or the backend allows, or the memory does not hold it; with what
            would.
    """
    spec = facts.spec
    dtype, dtype_why = choose_dtype(spec, config.dtype, facts.model.dtype)
    size = choose_block_size(spec, config.block_size)
    overlap = config.overlap or spec.overlap
    packed, packed_why = _packed(config, facts, dtype)
    by_dtype = facts.packed_bytes if packed and facts.packed_bytes is not None else facts.weight_bytes
    weights = by_dtype(dtype)
    budget, budget_why = _budget(config, facts, weights)
    length, length_why = _longest(config, facts, size)
    tokens, tokens_why = _step_tokens(config, spec)
    requests, requests_why = _requests(config, spec, tokens)

    def plan(max_model_len: int) -> CacheBudget:
        return plan_cache(
            spec,
            facts.block_bytes,
            facts.layers(dtype),
            block_size=size,
            max_requests=requests,
            max_model_len=max_model_len,
            max_step_tokens=tokens * overlap,
            budget_bytes=budget,
            num_blocks=config.num_blocks,
        )

    try:
        cache = plan(length)
    except ConfigError:
        fitting = None if config.max_model_len is not None else _fitting(plan, size, length)
        if fitting is None:
            raise
        length, length_why = fitting, "the longest of which the KV cache's budget holds one request"
        cache = plan(length)
    _check_room(config, facts, cache, weights)
    decided = {
        "backend": (spec.name, facts.backend_reason),
        "dtype": (dtype, dtype_why),
        "quantized": ("packed" if packed else "dequantized", packed_why),
        "max_model_len": (str(length), length_why),
        "max_requests": (str(requests), requests_why),
        "max_batch_tokens": (str(tokens), tokens_why),
        "block_size": (str(size), "given" if config.block_size else "the backend's preferred size"),
        "num_blocks": _num_blocks(config, cache, size),
        "kv_cache_bytes": (
            _bytes_text(cache.num_bytes if config.num_blocks else budget),
            "what num_blocks takes" if config.num_blocks else budget_why,
        ),
        "overlap": (str(overlap), "given" if config.overlap else "what the backend declares"),
        **_not_given(config),
    }
    _check_determinism(config, spec)
    _check_tables(spec, cache, length)
    return Resolution(
        dtype=dtype,
        packed=packed,
        max_model_len=length,
        max_requests=requests,
        max_batch_tokens=tokens,
        block_size=size,
        overlap=overlap,
        weight_bytes=weights,
        cache=cache,
        choices=_choices(config, decided),
        vocab_size=facts.model.vocab_size,
        eos_token_ids=facts.model.eos_token_ids,
        prefill_multiple=spec.batch.prefill_multiple,
    )


def _bytes_text(count: int) -> str:
    return f"{count} ({count / _MIB:.0f} MiB)"


def _not_given(config: EngineConfig) -> dict[str, tuple[str, str]]:
    """Options whose value is decided elsewhere where none is given."""
    found = {}
    if config.max_waiting is None:
        found["max_waiting"] = (
            "no limit",
            f"not given; a server and AsyncLLM have {config.served_max_waiting}",
        )
    if config.num_threads is None:
        found["num_threads"] = ("the backend's own", "not given; where it counts, the cores divided by ranks")
    return found


def _check_room(config: EngineConfig, facts: Facts, cache: CacheBudget, weights: int) -> None:
    """Refuse a cache that was asked for and does not fit."""
    left = facts.memory.free_bytes - weights
    if cache.num_bytes > left:
        name = "num_blocks" if config.num_blocks else "kv_cache_bytes"
        raise ConfigError(
            f"{name} is {getattr(config, name)}, which takes {cache.num_bytes / _MIB:.0f} MiB, but the "
            f"weights leave {left / _MIB:.0f} of {facts.memory.free_bytes / _MIB:.0f} MiB free; lower it"
        )


def _check_determinism(config: EngineConfig, spec: BackendSpec) -> None:
    if config.batch_invariant and spec.determinism != "batch_invariant":
        raise ConfigError(
            f"batch_invariant is asked for, but the determinism that backend {spec.name!r} promises is "
            f"{spec.determinism!r}: its results may depend on a request's neighbours; leave the option out, "
            "or choose a backend that promises it"
        )


def _step_tokens(config: EngineConfig, spec: BackendSpec) -> tuple[int, str]:
    """Tokens of a step at most: what was asked for, within what the backend takes."""
    wanted = config.max_batch_tokens
    ladder = spec.shapes.token_buckets
    limits = [limit for limit in (spec.batch.max_tokens, ladder[-1] if ladder else None) if limit is not None]
    tokens = min([wanted, *limits])
    if tokens < spec.batch.prefill_multiple:
        raise ConfigError(
            f"max_batch_tokens is {tokens}, but backend {spec.name!r} takes prompts in multiples of "
            f"{spec.batch.prefill_multiple} tokens; raise it to at least that"
        )
    return tokens, "the most that the backend takes" if tokens < wanted else _given(
        config, "max_batch_tokens"
    )


def _requests(config: EngineConfig, spec: BackendSpec, tokens: int) -> tuple[int, str]:
    """Sequences at once at most: each takes a row of a step, and a token."""
    wanted = config.max_requests
    ladder = spec.shapes.request_buckets
    limits = [
        limit for limit in (spec.batch.max_requests, ladder[-1] if ladder else None) if limit is not None
    ]
    if spec.batch.mixed:
        # Decode rows take their tokens first; what is left must hold a chunk, or prompts wait for them all.
        limits.append(tokens - spec.batch.prefill_multiple + 1)
    requests = min([wanted, tokens, *limits])
    return requests, "the most that the backend takes" if requests < wanted else _given(
        config, "max_requests"
    )


def _given(config: EngineConfig, name: str) -> str:
    default = next(f.default for f in fields(config) if f.name == name)
    return "default" if getattr(config, name) == default else "given"


def _check_tables(spec: BackendSpec, cache: CacheBudget, length: int) -> None:
    limit = spec.cache.max_table_bytes
    for group in cache.plan.groups if limit is not None else ():
        wanted = 0 if group.kind == "state" else 4 * cache.plan.max_requests * -(-length // group.block_size)
        if limit is not None and wanted > limit:
            raise ConfigError(
                f"a block table of {cache.plan.max_requests} requests and {length} tokens takes {wanted} "
                f"bytes, but backend {spec.name!r} takes {limit} at most; lower max_requests or max_model_len"
            )


def choose_dtype(spec: BackendSpec, wanted: str, checkpoint: str) -> tuple[str, str]:
    """The compute dtype, and why.

    Raises:
        UnsupportedError: the backend does not compute in the wanted dtype.
    """
    if wanted == "auto":
        if checkpoint in spec.dtypes:
            return checkpoint, "the checkpoint's"
        return spec.dtypes[0], f"the backend's first; it does not compute in the checkpoint's {checkpoint}"
    if wanted not in spec.dtypes:
        raise UnsupportedError(
            f"backend {spec.name!r} does not compute in {wanted!r}; choose from {', '.join(spec.dtypes)}"
        )
    return wanted, "given"


def _packed(config: EngineConfig, facts: Facts, dtype: str) -> tuple[bool, str]:
    """Whether quantized weights stay packed, and why."""
    if facts.packed_bytes is None:
        if config.quantized == "packed":
            schemes = ", ".join(facts.spec.quantization) or "none"
            raise ConfigError(
                "quantized is 'packed', but the model has no weights in a scheme that backend "
                f"{facts.spec.name!r} keeps ({schemes}); leave the option out"
            )
        return False, "nothing to keep: no weights in a scheme that the backend keeps"
    if config.quantized != "auto":
        return config.quantized == "packed", "given"
    free, large, small = facts.memory.free_bytes, facts.weight_bytes(dtype), facts.packed_bytes(dtype)
    sizes = f"{large / _MIB:.0f} MiB in {dtype} (packed {small / _MIB:.0f}), of {free / _MIB:.0f} MiB free,"
    room = config.kv_cache_bytes if config.kv_cache_bytes is not None else int(free * _ROOM)
    if free - large >= room:
        return False, f"{sizes} leave room, and are faster"
    return True, f"{sizes} leave less than the {room / _MIB:.0f} MiB wanted for the KV cache"


def _budget(config: EngineConfig, facts: Facts, weights: int) -> tuple[int, str]:
    free = facts.memory.free_bytes
    left = free - weights
    if left <= 0:
        raise ConfigError(
            f"the weights need {weights / _MIB:.0f} MiB, but the device has {free / _MIB:.0f} MiB free; "
            "free memory on it, share the model among more ranks, or choose a smaller model or dtype"
        )
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes, "given"
    return int(left * _KV_SHARE), (
        f"{_KV_SHARE:.0%} of the {left / _MIB:.0f} MiB that the weights leave of {free / _MIB:.0f} MiB free; "
        "no more of it is taken than all requests can use"
    )


def _longest(config: EngineConfig, facts: Facts, size: int) -> tuple[int, str]:
    """The maximum length that model and backend allow, and what set it."""
    rules, widths = facts.spec.batch, facts.spec.shapes.width_buckets
    limits = [(facts.model.max_position, f"the model was made for {facts.model.max_position} positions")]
    if rules.max_rows_x_context is not None:
        most = rules.max_rows_x_context // rules.min_decode_rows // size * size
        limits.append(
            (most, f"the backend's limit of rows x context, {rules.max_rows_x_context}, allows {most}")
        )
    if widths:
        limits.append((widths[-1] * size, f"the backend's widest block table holds {widths[-1] * size}"))
    limit, why = min(limits)
    if config.max_model_len is None:
        return (
            (_USUAL_LENGTH, "the usual limit; give a larger one for more")
            if limit > _USUAL_LENGTH
            else (limit, why)
        )
    if config.max_model_len > limit:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but {why}; lower it")
    return config.max_model_len, "given"


def _fitting(plan: Callable[[int], CacheBudget], size: int, longest: int) -> int | None:
    """The largest whole number of blocks, in tokens, that can be planned; None where not even one is."""
    low, high = 0, longest // size
    while low < high:
        middle = (low + high + 1) // 2
        try:
            plan(middle * size)
            low = middle
        except ConfigError:
            high = middle - 1
    return low * size or None


def _num_blocks(config: EngineConfig, cache: CacheBudget, size: int) -> tuple[str, str]:
    count = cache.num_tokens // size
    held = f"{count * size} tokens, {cache.full_requests:.1f} requests of full length"
    why = f"{held}, in {cache.num_bytes / _MIB:.0f} MiB"
    if config.num_blocks:
        why = f"{config.num_blocks} were given, of which one holds padding: {why}"
    return str(count), why


def _choices(config: EngineConfig, decided: dict[str, tuple[str, str]]) -> tuple[Choice, ...]:
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in decided:
            found.append(Choice(f.name, *decided[f.name]))
        elif value is None:
            found.append(Choice(f.name, "-", str(f.metadata["otherwise"])))
        else:
            is_default = value == f.default or (f.name == "backend_options" and not value)
            found.append(Choice(f.name, str(value), "default" if is_default else "given"))
    return tuple(found)
