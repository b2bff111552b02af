"""What the engine's own process costs: AsyncLLM against LLM on the null backend, which computes nothing.

Every request has a prompt of token ids and makes a fixed number of tokens; as many run at once as the engine
takes. Prints, and with --out writes, requests per second, tokens per second and microseconds per token of
both, with and without text, and their differences; each figure is the best of some rounds.

    python benchmarks/serving_overhead.py --out benchmarks/results/serving_overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from core.engine.async_llm import AsyncLLM
from core.engine.config import EngineConfig
from core.engine.llm import LLM
from core.sampling.params import SamplingParams

VOCAB, WIDTH = 256, 16
PROMPT, MAX_LEN, MAX_REQUESTS, MEMORY = 32, 512, 64, 1 << 28


@dataclass(frozen=True)
class Load:
    """What is asked of both."""

    requests: int
    tokens: int
    rounds: int

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids; no two begin alike."""
        return [[(i + j * j) % VOCAB for j in range(PROMPT)] for i in range(self.requests)]

    def params(self, text: bool) -> SamplingParams:
        """Of every request."""
        return SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True, detokenize=text)


def write_model(folder: Path) -> Path:
    """The smallest Llama there is, with a tokenizer of one byte per token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
        layer + "input_layernorm.weight": (WIDTH,),
        layer + "post_attention_layernorm.weight": (WIDTH,),
        **{f"{layer}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"},
        **{f"{layer}mlp.{p}_proj.weight": (WIDTH, WIDTH) for p in ("gate", "up", "down")},
    }
    save_file({name: np.zeros(s, np.float32) for name, s in shapes.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_LEN,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def offline(folder: Path, load: Load) -> dict[str, float]:
    """Seconds of LLM, without and with text."""
    with LLM(
        folder,
        backend="null",
        dtype="float32",
        max_model_len=MAX_LEN,
        max_requests=MAX_REQUESTS,
        show_progress=False,
        backend_options={"memory": str(MEMORY)},
    ) as llm:

        def run(text: bool) -> float:
            start = time.perf_counter()
            llm.generate(load.prompts, load.params(text))
            return time.perf_counter() - start

        return {name: min(run(text) for _ in range(load.rounds)) for name, text in KINDS.items()}


async def served(folder: Path, load: Load) -> dict[str, float]:
    """Seconds of AsyncLLM, each request a task that takes every output."""
    config = EngineConfig(
        model=folder,
        backend="null",
        dtype="float32",
        max_model_len=MAX_LEN,
        max_requests=MAX_REQUESTS,
        max_waiting=load.requests,
        backend_options={"memory": str(MEMORY)},
    )
    async with await AsyncLLM.start(config) as llm:

        async def one(prompt: list[int], params: SamplingParams) -> None:
            async for _ in llm.generate(prompt, params):
                pass

        async def run(text: bool) -> float:
            start = time.perf_counter()
            await asyncio.gather(*(one(prompt, load.params(text)) for prompt in load.prompts))
            return time.perf_counter() - start

        return {name: min([await run(text) for _ in range(load.rounds)]) for name, text in KINDS.items()}


KINDS = {"ids": False, "text": True}


def figures(seconds: dict[str, float], load: Load) -> dict[str, dict[str, float]]:
    """Rates of one side."""
    tokens = load.requests * load.tokens
    return {
        name: {
            "requests_per_s": round(load.requests / s, 1),
            "tokens_per_s": round(tokens / s),
            "us_per_token": round(s / tokens * 1e6, 2),
        }
        for name, s in seconds.items()
    }


def measure(load: Load) -> dict[str, Any]:
    """Both sides and what the difference is per token."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        one, other = offline(folder, load), asyncio.run(served(folder, load))
    tokens = load.requests * load.tokens
    return {
        "LLM": figures(one, load),
        "AsyncLLM": figures(other, load),
        "overhead_us_per_token": {k: round((other[k] - one[k]) / tokens * 1e6, 2) for k in KINDS},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    load = Load(given.requests, given.tokens, given.rounds)
    result = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "requests": load.requests,
        "tokens_each": load.tokens,
        "prompt": PROMPT,
        "at_once": MAX_REQUESTS,
        **measure(load),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
