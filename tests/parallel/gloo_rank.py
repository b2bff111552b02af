"""One rank of a model in a process of its own: `python -m tests.parallel.gloo_rank FOLDER RANK RANKS PORT
OUT`.

Writes the logits that `tests.models.harness` gives, float64 [T + SHORT, V], to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from core.contract.requests import CommunicatorRequest
from core.parallel.sharding import Shard
from core.parallel.tensor_parallel import TensorParallelOps
from tests.backends.harness import device_of, plugin
from tests.models.harness import bench_of, script
from tests.models.tiny import tokens


def main(folder: Path, rank: int, world_size: int, port: int, out: Path) -> None:
    """Compute and write this rank's logits."""
    communicator = plugin("cpu").core_communicator(
        CommunicatorRequest(
            device=device_of("cpu"),
            group="tp",
            rank=rank,
            world_size=world_size,
            rendezvous=f"tcp://127.0.0.1:{port}",
        )
    )
    ids = tokens()
    bench = bench_of(
        folder,
        ids,
        "cpu",
        "float32",
        shard=Shard(rank, world_size),
        table=lambda ops: TensorParallelOps(ops, communicator),
    )
    np.save(out, bench.run(script(len(ids))).astype(np.float64))
    communicator.barrier()
    communicator.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
