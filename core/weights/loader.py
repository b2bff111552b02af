"""From a checkpoint to a model on a device: checks, reads the rank's slices, packs, and closes the step
function.

Everything is checked before the first byte is packed: every part exists with the right shape, and nothing is
left over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.batch import Step
from core.contract.errors import WeightError
from core.contract.interfaces import StepFunction
from core.contract.ops import Ops
from core.contract.types import Array, CacheHandle, Packed, PackRequest, Param, Part
from core.models.base import Constant, ModelDefinition, leaves, map_tree, rope_table
from core.models.config import ModelConfig
from core.parallel.sharding import Shard, mark
from core.weights.checkpoint import BLOCKS, Checkpoint, Index, PackedCheckpoint

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on a device: its local configuration, packed weights and the step function over them."""

    config: ModelConfig
    weights: tuple[Packed, ...]
    fn: StepFunction


def check_checkpoint(definition: ModelDefinition, c: ModelConfig, checkpoint: Checkpoint) -> None:
    """Hold the checkpoint against the model's parameters.

    Raises:
        WeightError: a tensor is missing, has the wrong shape, or is not the model's; names file, tensor,
        found, wanted.
    """
    names = set(checkpoint.names())
    used: set[str] = set()
    for leaf in leaves(definition.params(c)):
        for part in leaf.parts if isinstance(leaf, Param) else ():
            used.add(part.name)
            if part.name not in names:
                raise WeightError(f"{checkpoint.path} has no tensor {part.name!r} of shape {part.shape}")
            found = checkpoint.shape(part.name)
            if not _fits(part, found):
                raise WeightError(
                    f"{checkpoint.path}: tensor {part.name!r} has shape {found}, but the config "
                    f"wants {part.shape}{f' from {part.start}' if part.start else ''}"
                )
    _check_whole(definition, c, checkpoint)
    surplus = sorted(n for n in names - used if not definition.ignored(c, n))
    if surplus:
        raise WeightError(
            f"{checkpoint.path} has {len(surplus)} tensors that {c.architecture} does not use, "
            f"first {surplus[0]!r}; check that config.json belongs to these weights"
        )


def _check_whole(definition: ModelDefinition, c: ModelConfig, checkpoint: Checkpoint) -> None:
    """Refuse a tensor that holds more than the regions which the model reads of it."""
    held: dict[str, int] = {}
    params = [leaf for leaf in leaves(definition.params(c)) if isinstance(leaf, Param)]
    for part in dict.fromkeys(part for param in params for part in param.parts):
        held[part.name] = held.get(part.name, 0) + prod(part.shape)
    for name, size in held.items():
        shape = checkpoint.shape(name)
        if prod(shape) != size:
            raise WeightError(
                f"{checkpoint.path}: tensor {name!r} has shape {shape}, of which {c.architecture} reads "
                f"{size} of {prod(shape)} elements; check that config.json belongs to these weights"
            )


def _fits(part: Part, found: tuple[int, ...]) -> bool:
    """Whether a stored tensor of shape `found` is, or holds, this part."""
    shape = part.shape
    if part.pick is not None:
        period, _, size = part.pick
        shape = _replaced(shape, part.pick_axis, shape[part.pick_axis] // size * period)
    if len(found) != len(shape):
        return False
    if part.start is None:
        return found == shape
    return all(s + n <= f for s, n, f in zip(part.start, shape, found, strict=True))


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

    Parameters quantized in one of `schemes` are packed as they are, all others decoded.

    Raises:
        WeightError: as `check_checkpoint`. OutOfMemoryError: the device is full.
    """
    shard = shard or Shard()
    local = c.local(shard.world_size)
    check_checkpoint(definition, c, checkpoint)
    tree = definition.params(c)
    order = leaves(tree)
    sizes = [_num_bytes(leaf, checkpoint) for leaf in order]
    done, packed = 0, []
    for leaf, size in zip(order, sizes, strict=True):
        if isinstance(leaf, Constant):
            table = rope_table(leaf.rope, max_length)
            packed.append(pack(PackRequest(array=table, uses=("constant",), dtype=dtype, name=leaf.name)))
        else:
            scheme = kept_scheme(checkpoint, leaf, shard, schemes)
            array = read_param(checkpoint, leaf, shard, scheme)
            packed.append(
                pack(
                    PackRequest(
                        array=array, uses=leaf.uses, dtype=dtype, name=leaf.parts[0].name, scheme=scheme
                    )
                )
            )
        done += size
        if progress is not None:
            progress(done, sum(sizes))
    return LoadedModel(local, tuple(packed), step_function(definition, local, tree, shard))


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


def _num_bytes(leaf: Param | Constant, checkpoint: Checkpoint) -> int:
    return sum(checkpoint.nbytes(p.name) for p in leaf.parts) if isinstance(leaf, Param) else 0


def read_param(checkpoint: Checkpoint, param: Param, shard: Shard, scheme: str = "") -> npt.NDArray[Any]:
    """This rank's share of a parameter: parts cut one by one, then joined (and stacked).

    With a scheme, as `kept_scheme` found it, rows of blocks in place of rows of values.
    """
    if scheme and isinstance(checkpoint, PackedCheckpoint):
        arrays: list[npt.NDArray[Any]] = [
            checkpoint.read_blocks(part.name, _index(part, shard.ranges(part))) for part in param.parts
        ]
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
