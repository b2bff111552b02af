"""A model cut over ranks computes what it computes whole: heads, widths and vocabulary of every family.

The ranks are threads, each with a reference backend of its own; in float64 only the order of sums differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.contract.errors import UnsupportedError
from core.contract.interfaces import Communicator
from core.parallel.sharding import Shard
from core.parallel.tensor_parallel import TensorParallelOps
from tests.models.harness import Float64, bench_of, model_logits, script
from tests.models.tiny import FAMILIES, tokens

EXACT = 1e-9
IDS = tokens()
# All have 4 query heads and 1 or 2 KV heads, which more ranks hold several times; a delta net of 2 key heads
# is not cut in 4,
# and latent attention has no KV heads.
CASES = [(f.name, 2) for f in FAMILIES] + [
    (n, 4)
    for n in (
        "llama_bias",
        "qwen2_window",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
        "mixtral",
        "gpt_oss",
        "llama4",
        "glm4_moe",
    )
]

Folder = Callable[[str], Path]


class Meeting:
    """Where the threads of a group exchange arrays."""

    def __init__(self, world_size: int) -> None:
        self.arrays: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size)


class ThreadCommunicator(Communicator):
    """A member of a group of threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return len(self._meeting.arrays)

    def _exchange(self, x: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        self._meeting.arrays[self._rank] = x.copy()
        self._meeting.barrier.wait(60)
        arrays = list(self._meeting.arrays)
        self._meeting.barrier.wait(60)
        return arrays

    def all_reduce(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        total: npt.NDArray[Any] = np.sum(self._exchange(x), 0)
        return total

    def all_gather(self, x: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
        return np.concatenate(self._exchange(x), dim)


def sharded_logits(folder: Path, world_size: int) -> list[Float64]:
    """Each rank's logits, as `model_logits` gives them."""
    meeting = Meeting(world_size)

    def rank_logits(rank: int) -> Float64:
        try:
            bench = bench_of(
                folder,
                IDS,
                "cpu_reference",
                "float64",
                shard=Shard(rank, world_size),
                table=lambda ops: TensorParallelOps(ops, ThreadCommunicator(meeting, rank)),
            )
            return bench.run(script(len(IDS))).astype(np.float64)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank_logits, range(world_size)))


@pytest.mark.parametrize(("name", "world_size"), CASES, ids=[f"{n}-{w}" for n, w in CASES])
def test_every_rank_has_the_logits_of_the_whole_model(
    name: str, world_size: int, tiny_folder: Folder
) -> None:
    folder = tiny_folder(name)
    whole = model_logits(folder, IDS, "cpu_reference", "float64")
    for found in sharded_logits(folder, world_size):
        assert np.abs(found - whole).max() <= EXACT * np.abs(whole).max()


def test_heads_that_do_not_divide_are_refused_with_the_world_sizes_that_do(tiny_folder: Folder) -> None:
    with pytest.raises(UnsupportedError, match=r"2 linear-attention key heads.*use one of \[1, 2\]"):
        bench_of(tiny_folder("qwen3_5"), IDS, "cpu_reference", "float64", shard=Shard(0, 4))
