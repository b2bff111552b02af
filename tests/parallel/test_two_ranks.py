"""Two processes over gloo give one process's logits, within what two ways of summing may differ."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.models.conftest import tiny_folder
from tests.models.harness import Float64, bench_of, model_logits, script
from tests.models.tiny import tokens
from tests.parallel.perturbed import PerturbedOps

__all__ = ["tiny_folder"]

ROOT = Path(__file__).parents[2]
IDS = tokens()
FAMILIES = ("llama", "qwen3_one_kv_head", "qwen3_moe", "qwen3_5")
DRAWS = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_ranks(folder: Path, out: Path) -> list[Float64]:
    """Each rank's logits."""
    port = str(free_port())
    paths = [out / f"rank{rank}.npy" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.gloo_rank", str(folder), str(rank), "2", port, str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, path in enumerate(paths)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    return [np.load(path) for path in paths]


def spread(folder: Path) -> Float64:
    """How far each position's logits move when every product is off by its bound: [T + SHORT]."""
    exact = model_logits(folder, IDS, "cpu_reference", "float64")
    moved = [
        bench_of(folder, IDS, "cpu_reference", "float64", table=lambda ops, s=seed: PerturbedOps(ops, s)).run(
            script(len(IDS))
        )
        for seed in range(DRAWS)
    ]
    most: Float64 = np.max([np.abs(m - exact).max(-1) for m in moved], axis=0)
    return most


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_give_one_ranks_logits(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    one = model_logits(folder, IDS, "cpu", "float32")
    bound = spread(folder)
    assert bound.max() < 1e-2 * np.abs(one).max(), "a bound this wide would prove nothing"
    first, second = two_ranks(folder, tmp_path)
    np.testing.assert_array_equal(first, second)
    assert (np.abs(first - one).max(-1) <= bound).all()
