"""`core bench`: throughput, latency and start-up of an engine, and a load on a running server.

Prompts are random token ids of a seed, so every run and every engine gets the same work. Figures are printed,
and written as JSON with --output.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from core.cli.options import with_engine_options, with_options
from core.contract.errors import ConfigError
from core.engine.config import EngineConfig
from core.engine.resolve import Resolution

bench = typer.Typer(name="bench", help="Measure an engine or a server.", no_args_is_help=True)

Options = dict[str, Any]
Model = Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")]
Output = Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and arrivals.")]

_FIRST_ID, _LAST_ID = 300, 5000
"""Random ids come from this range, or from half the vocabulary where that is smaller: no special tokens."""


@bench.command()
@with_engine_options
def throughput(
    model: Model,
    options: Options,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests, all queued at once.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens of each.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 64,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Tokens per second with everything queued at once."""
    from core.engine.llm import LLM

    with LLM(
        model, **options, show_progress=sys.stderr.isatty(), on_resolved=_fits(input_len, output_len)
    ) as llm:
        prompts = random_prompts(num_prompts, input_len, llm.engine.model.vocab_size, seed)
        params = _fixed(output_len)
        llm.generate(prompts[:1], _fixed(2))
        start = time.perf_counter()
        found = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        generated = sum(len(o.outputs[0].token_ids) for o in found)
        _report(
            {
                **_place(llm),
                "num_prompts": num_prompts,
                "input_len": input_len,
                "output_len": output_len,
                "seconds": seconds,
                "requests_per_s": num_prompts / seconds,
                "output_tokens_per_s": generated / seconds,
                "total_tokens_per_s": (generated + num_prompts * input_len) / seconds,
            },
            output,
        )


@bench.command()
@with_options(EngineConfig, "options", prefix_cache=False)
def latency(
    model: Model,
    options: Options,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens of each.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 64,
    iterations: Annotated[int, typer.Option(min=1, help="Batches, one after another.")] = 10,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Time of one batch from first to last token, and of each token.

    Every batch has the same prompts, so prefixes are not cached unless that is asked for.
    """
    from core.engine.llm import LLM

    with LLM(
        model,
        **options,
        show_progress=sys.stderr.isatty(),
        on_resolved=_fits(input_len, output_len),
    ) as llm:
        prompts = random_prompts(batch_size, input_len, llm.engine.model.vocab_size, seed)
        llm.generate(prompts, _fixed(2))
        seconds, firsts = [], []
        for _ in range(iterations):
            start = time.perf_counter()
            found = llm.generate(prompts, _fixed(output_len), use_tqdm=False)
            seconds.append(time.perf_counter() - start)
            firsts.append(max(o.metrics.first_token_s or 0.0 for o in found))
        each = [(s - f) / max(1, output_len - 1) for s, f in zip(seconds, firsts, strict=True)]
        _report(
            {
                **_place(llm),
                "batch_size": batch_size,
                "input_len": input_len,
                "output_len": output_len,
                "iterations": iterations,
                **_spread("latency_s", seconds),
                **_spread("time_to_first_token_s", firsts),
                **_spread("time_per_output_token_s", each),
            },
            output,
        )


@bench.command()
@with_engine_options
def startup(
    model: Model,
    options: Options,
    iterations: Annotated[int, typer.Option(min=1, help="Starts, one after another.")] = 3,
    output: Output = None,
) -> None:
    """Time from the start of a new process to an engine that serves, and to its first token."""
    from core.env import cache_dir
    from core.weights.sample import resolve_model

    path = resolve_model(model, cache_dir())
    given = {k: v for k, v in options.items() if v is not None}
    runs = [_one_start(str(path), given) for _ in range(iterations)]
    figures: dict[str, Any] = {"model": path.name, "iterations": iterations}
    for name in runs[0]:
        figures |= _spread(name, [run[name] for run in runs])
    _report(figures, output)


_START = """
import json, sys, time
from core import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], show_progress=False, **json.loads(sys.argv[2]))
ready = time.time()
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, temperature=0))
print(json.dumps([imported, ready, time.time()]))
llm.close()
"""


def _one_start(model: str, options: Mapping[str, Any]) -> dict[str, float]:
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _START, model, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"the engine did not start: {done.stderr.strip().splitlines()[-1]}")
    imported, ready, first = json.loads(done.stdout.strip().splitlines()[-1])
    return {"import_s": imported - start, "ready_s": ready - start, "first_token_s": first - start}


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000/v1",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens of each.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 64,
    request_rate: Annotated[
        float | None, typer.Option(help="Requests per second, arriving at random; not given: all at once.")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once at most.")] = None,
    vocab_size: Annotated[int, typer.Option(min=8, help="Random ids are below this.")] = _LAST_ID,
    api_key: Annotated[str | None, typer.Option(help="The server's key.")] = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Load a running server of the OpenAI API and measure what its clients see."""
    from core.env import api_key as environment_key

    if request_rate is not None and not 0 < request_rate < float("inf"):
        raise ConfigError(f"--request-rate is {request_rate:g}; a number above 0 is wanted")
    prompts = random_prompts(num_prompts, input_len, vocab_size, seed)
    figures = asyncio.run(
        _load(url, api_key or environment_key(), prompts, output_len, request_rate, max_concurrency, seed)
    )
    settings = {
        "num_prompts": num_prompts,
        "input_len": input_len,
        "output_len": output_len,
        "request_rate": request_rate,
        "max_concurrency": max_concurrency,
    }
    _report({"python": platform.python_version(), **settings, **figures}, output)


async def _load(
    url: str,
    api_key: str | None,
    prompts: Sequence[list[int]],
    output_len: int,
    rate: float | None,
    concurrency: int | None,
    seed: int,
) -> dict[str, Any]:
    from core.server.client import Answer, Client

    gate = asyncio.Semaphore(concurrency or len(prompts))
    arrivals, at = [], 0.0
    generator = random.Random(seed)
    for _ in prompts:
        arrivals.append(at)
        at += 0.0 if rate is None else generator.expovariate(rate)
    async with Client(url, api_key=api_key) as client:
        name = await client.model()
        body = {"model": name, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}

        async def one(prompt: list[int], when: float) -> Answer:
            await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
            async with gate:
                return await client.ask("/v1/completions", {**body, "prompt": prompt})

        start = time.perf_counter()
        found = await asyncio.gather(*map(one, prompts, arrivals), return_exceptions=True)
        seconds = time.perf_counter() - start
    answers = [a for a in found if isinstance(a, Answer)]
    errors = [e for e in found if isinstance(e, BaseException)]
    if not answers:
        raise ConfigError(f"no request of {len(prompts)} succeeded; the first error: {errors[0]}")
    gaps = [b - a for x in answers for a, b in zip(x.times, x.times[1:], strict=False)]
    tokens = sum(a.completion_tokens for a in answers)
    return {
        "model": name,
        "succeeded": len(answers),
        "failed": len(errors),
        "first_error": str(errors[0]) if errors else None,
        "seconds": seconds,
        "requests_per_s": len(answers) / seconds,
        "output_tokens_per_s": tokens / seconds,
        **_spread("time_to_first_token_s", [a.first_s for a in answers]),
        **_spread("time_per_output_token_s", [a.per_token_s for a in answers]),
        **_spread("inter_token_latency_s", gaps),
        **_spread("latency_s", [a.total_s for a in answers]),
    }


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids, the same for the same seed."""
    generator = random.Random(seed)
    low, high = (_FIRST_ID, _LAST_ID) if vocab_size > _LAST_ID else (vocab_size // 4, vocab_size // 2)
    return [[generator.randrange(low, high) for _ in range(length)] for _ in range(count)]


def _fits(input_len: int, output_len: int) -> Callable[[Resolution], None]:
    """Told what was decided, it refuses requests that are too long, before weights are read."""
    return lambda resolution: resolution.limits.check(input_len, _fixed(output_len))


def _fixed(length: int) -> Any:
    from core.sampling.params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)


def _place(llm: Any) -> dict[str, Any]:
    engine = llm.engine
    return {
        "model": engine.config.model.name,
        "backend": engine.backend.name,
        "dtype": engine.dtype,
        "python": platform.python_version(),
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles by the nearest rank."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    parts: dict[str, Callable[[], float]] = {
        "mean": lambda: statistics.fmean(ordered),
        "p50": lambda: statistics.median(ordered),
        "p90": lambda: at(0.9),
        "p99": lambda: at(0.99),
    }
    return {f"{name}.{part}": figure() for part, figure in parts.items()}


def _report(figures: Mapping[str, Any], output: Path | None) -> None:
    width = max(map(len, figures))
    for name, value in figures.items():
        if value is not None:
            typer.echo(
                f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
            )
    if output is not None:
        output.write_text(json.dumps(dict(figures), indent=2) + "\n")
