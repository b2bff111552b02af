"""From a checkpoint to a model on a device: checks, reads the rank's slices, packs, and closes the step
function.

What the headers tell is checked before the first byte is packed (`core.weights.checks`); whether all values
are finite is asked before (`core.weights.verify`). A load that fails holds no memory on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.batch import Step
from core.contract.interfaces import StepFunction
from core.contract.ops import Ops
from core.contract.types import Array, CacheHandle, Packed, PackRequest, Param, Part
from core.models.base import Constant, ModelDefinition, leaves, map_tree, rope_table
from core.models.config import ModelConfig
from core.parallel.sharding import Shard, mark
from core.weights.checkpoint import BLOCKS, Checkpoint, Index, PackedCheckpoint
from core.weights.checks import check_checkpoint

T = TypeVar("T")


@dataclass(frozen=True)
class LoadState:
    """How far loading is: bytes and tensors of this rank's share, seconds since it began.

    Attributes:
        phase: "loading", or before it "checking": values are looked at, and nothing is on a device.
    """

    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int
    seconds: float
    phase: Literal["checking", "loading"] = "loading"

    @property
    def bytes_per_s(self) -> float:
        """Speed since the beginning; 0 before any time has passed."""
        return self.bytes_done / self.seconds if self.seconds > 0 else 0.0

    def sentence(self) -> str:
        """Bytes, tensors and speed, for a log."""
        return (
            f"{self.bytes_done / 1e9:.2f} of {self.bytes_total / 1e9:.2f} GB, {self.tensors_done} of "
            f"{self.tensors_total} tensors, {self.bytes_per_s / 1e9:.2f} GB/s"
        )


Progress = Callable[[LoadState], None]
"""Told before the first parameter is read and after each."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on a device: its local configuration, packed weights and the step function over them."""

    config: ModelConfig
    weights: tuple[Packed, ...]
    fn: StepFunction


def load_model(
    definition: ModelDefinition,
    c: ModelConfig,
    checkpoint: Checkpoint,
    pack: Callable[[PackRequest], Packed],
    *,
    dtype: str,
    max_length: int,
    shard: Shard | None = None,
    schemes: Collection[str] = (),
    progress: Progress | None = None,
) -> LoadedModel:
    """Read, cut and pack every parameter of `c` (global); `max_length` positions of rotary tables.

    Parameters quantized in one of `schemes` are packed as they are, all others decoded. If it fails, nothing
    stays on the device.

    Raises:
        WeightError: as `check_checkpoint`. OutOfMemoryError: the device is full.
    """
    shard = shard or Shard()
    local = replace(c.local(shard.world_size), compute_dtype=dtype)
    check_checkpoint(definition, c, checkpoint)
    tree = definition.params(c)
    order = leaves(tree)
    counter = _Counter(order, checkpoint, shard, progress)
    packed: list[Packed] = []
    try:
        for leaf in order:
            packed.append(pack(_pack_request(leaf, checkpoint, shard, dtype, max_length, schemes)))
            counter.add(leaf)
    except BaseException:
        # The error's traceback keeps this frame, and with it what was packed before.
        packed.clear()
        raise
    return LoadedModel(local, tuple(packed), step_function(definition, local, tree, shard))


def _pack_request(
    leaf: Param | Constant,
    checkpoint: Checkpoint,
    shard: Shard,
    dtype: str,
    max_length: int,
    schemes: Collection[str],
) -> PackRequest:
    if isinstance(leaf, Constant):
        table = rope_table(leaf.rope, max_length)
        return PackRequest(array=table, uses=("constant",), dtype=dtype, name=leaf.name)
    scheme = kept_scheme(checkpoint, leaf, shard, schemes)
    array = read_param(checkpoint, leaf, shard, scheme)
    return PackRequest(array=array, uses=leaf.uses, dtype=dtype, name=leaf.parts[0].name, scheme=scheme)


class _Counter:
    """Counts what was loaded of a rank's share, and tells it."""

    def __init__(
        self,
        order: tuple[Param | Constant, ...],
        checkpoint: Checkpoint,
        shard: Shard,
        progress: Progress | None,
    ) -> None:
        self._progress = progress
        self._start = time.monotonic()
        self._sizes = {
            leaf: sum(_read_bytes(checkpoint, part, shard) for part in leaf.parts)
            for leaf in order
            if isinstance(leaf, Param)
        }
        self._bytes, self._tensors = 0, 0
        self._total = sum(self._sizes.values()), sum(len(leaf.parts) for leaf in self._sizes)
        self._tell()

    def add(self, leaf: Param | Constant) -> None:
        if isinstance(leaf, Param):
            self._bytes += self._sizes[leaf]
            self._tensors += len(leaf.parts)
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - self._start
            self._progress(LoadState(self._bytes, self._total[0], self._tensors, self._total[1], seconds))


def _read_bytes(checkpoint: Checkpoint, part: Part, shard: Shard) -> int:
    """Bytes of the slice that a rank reads for a part."""
    stored = prod(checkpoint.shape(part.name))
    share = prod(r.stop - r.start for r in shard.ranges(part))
    num_bytes: int = checkpoint.nbytes(part.name) * share // max(stored, 1)
    return num_bytes


def weight_bytes(
    definition: ModelDefinition,
    c: ModelConfig,
    dtype: str,
    shard: Shard,
    checkpoint: Checkpoint | None = None,
    schemes: Collection[str] = (),
) -> int:
    """Device bytes of a rank's parameters; without a backend's own padding.

    Every element in `dtype`, but those of parameters that `checkpoint` has in one of `schemes`.
    """
    bits, total = int(ml_dtypes.finfo(dtype).bits), 0
    for leaf in leaves(definition.params(c)):
        if isinstance(leaf, Constant):
            continue
        elements = sum(prod(r.stop - r.start for r in shard.ranges(part)) for part in leaf.parts)
        scheme = "" if checkpoint is None else kept_scheme(checkpoint, leaf, shard, schemes)
        if scheme:
            size, num_bytes = BLOCKS[scheme]
            total += elements // size * num_bytes
        else:
            total += elements * bits // 8
    return total


def kept_scheme(checkpoint: Checkpoint, param: Param, shard: Shard, schemes: Collection[str]) -> str:
    """The scheme of `schemes` in which a rank's share of a parameter can stay; "" = it must be decoded.

    All parts have the same, are joined along rows and cut between blocks, and only products and look-ups read
    them.
    """
    if not schemes or not isinstance(checkpoint, PackedCheckpoint):
        return ""
    scheme = checkpoint.scheme(param.parts[0].name)
    if scheme not in schemes or not {"linear", "embed", "experts"}.issuperset(param.uses):
        return ""
    for part in param.parts:
        if checkpoint.scheme(part.name) != scheme:
            return ""
        columns = _index(part, shard.ranges(part))[-1]
        is_plain = part.pick is None and part.transform == "none" and param.join < len(part.shape) - 1
        if not is_plain or columns.start % BLOCKS[scheme][0] or columns.stop % BLOCKS[scheme][0]:
            return ""
    return scheme


def step_function(definition: ModelDefinition, local: ModelConfig, tree: Any, shard: Shard) -> StepFunction:
    """The model as a function of (ops, packed weights in `leaves` order, caches, step)."""
    index = {leaf: i for i, leaf in enumerate(leaves(tree))}
    places: list[int] = []
    map_tree(lambda leaf: places.append(index[leaf]), tree)

    def fn(
        ops: Ops, weights: tuple[Packed, ...], caches: tuple[CacheHandle, ...], step: Step
    ) -> tuple[Array, tuple[CacheHandle, ...]]:
        # Leaves come in one order always, so none is hashed in a step.
        place = iter(places)

        def array(leaf: Param | Constant) -> Any:
            packed = weights[next(place)]
            return mark(leaf, packed, shard) if isinstance(leaf, Param) else packed

        w = map_tree(array, tree)
        h, caches = definition.forward(ops, local, w, caches, step)
        return definition.head(ops, local, w, h, step), caches

    return fn


def read_param(checkpoint: Checkpoint, param: Param, shard: Shard, scheme: str = "") -> npt.NDArray[Any]:
    """This rank's share of a parameter: parts cut one by one, then joined (and stacked).

    With a scheme, as `kept_scheme` found it, rows of blocks in place of rows of values.
    """
    if scheme and isinstance(checkpoint, PackedCheckpoint):
        arrays: list[npt.NDArray[Any]] = []
        for part in param.parts:
            arrays.append(checkpoint.read_blocks(part.name, _index(part, shard.ranges(part))))
    else:
        arrays = [read_part(checkpoint, part, shard.ranges(part)) for part in param.parts]
    if not param.stack:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, param.join)
    size = len(arrays) // param.stack
    groups = [arrays[i : i + size] for i in range(0, len(arrays), size)]
    return np.stack([g[0] if size == 1 else np.concatenate(g, param.join) for g in groups])


def read_part(checkpoint: Checkpoint, part: Part, ranges: tuple[slice, ...]) -> npt.NDArray[Any]:
    """A slice of a part; `ranges` are relative to the part."""
    array = checkpoint.read(part.name, _index(part, ranges))
    if part.pick is not None:
        period, first, size = part.pick
        before, after = array.shape[: part.pick_axis], array.shape[part.pick_axis + 1 :]
        count = array.shape[part.pick_axis] // period
        groups = array.reshape(*before, count, period, *after)
        groups = groups[(*(slice(None),) * (len(before) + 1), slice(first, first + size))]
        array = groups.reshape(*before, count * size, *after)
    if part.transform == "add_one":
        array = array.astype(np.float64) + 1
    if part.transform == "transpose":
        return np.ascontiguousarray(array.swapaxes(-1, -2))
    return array[:, 0] if part.transform == "drop_axis_1" else array


def _index(part: Part, ranges: tuple[slice, ...]) -> Index:
    """Where a slice of a part lies in its stored tensor."""
    start = part.start or (0,) * len(part.shape)
    if part.pick is not None:
        period, _, size = part.pick
        rows = ranges[part.pick_axis]
        rows = slice(rows.start // size * period, rows.stop // size * period)
        ranges = _replaced(ranges, part.pick_axis, rows)
    return tuple(slice(s + r.start, s + r.stop) for s, r in zip(start, ranges, strict=True))


def _replaced(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])
