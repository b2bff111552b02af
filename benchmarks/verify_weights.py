"""What it costs to look at every weight before loading: seconds and GB/s, beside loading and reading alone.

The sample model (quantized) and one of random bfloat16 values of about 2 GB, both in the page cache. The
bound is a plain pass over the same mapped bytes by one thread (`numpy.bitwise_or.reduce`) in the same run.

    python benchmarks/verify_weights.py --out benchmarks/results/verify_weights.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.env import cache_dir
from core.executor.rank import read_model
from core.weights.checkpoint import open_checkpoint
from core.weights.dummy import dummy_checkpoint
from core.weights.sample import resolve_model
from core.weights.verify import verify_values

REPEATS = 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5504,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_large(folder: Path) -> Path:
    """The model of random values."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    source = dummy_checkpoint(folder)
    tensors = {name: source.read(name).astype(ml_dtypes.bfloat16) for name in source.names()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def median(call: Callable[[], Any]) -> float:
    """Seconds of a call, the median of five after one."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(path: Path) -> dict[str, float]:
    """Figures of one model."""
    checkpoint = open_checkpoint(path)
    definition, model = read_model(checkpoint)
    stored = [t.array for t in checkpoint.stored(checkpoint.names())]
    size = sum(array.nbytes for array in stored)

    def touch() -> None:
        for array in stored:
            np.bitwise_or.reduce(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def load() -> None:
        Engine(EngineConfig(model=path, backend="cpu", dtype="bfloat16", max_model_len=64)).close()

    check, read, start = (
        median(lambda: verify_values(definition, model, checkpoint)),
        median(touch),
        median(load),
    )
    return {
        "gigabytes": size / 1e9,
        "check_s": check,
        "check_gb_per_s": size / 1e9 / check,
        "plain_pass_s": read,
        "engine_start_s": start,
        "share_of_start": check / start,
    }


def main() -> None:
    """Measure both, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "sample": measure(resolve_model("sample", cache_dir())),
            "bfloat16": measure(write_large(Path(folder) / "large")),
        }
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "figures": figures,
    }
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
