"""`core generate`: prompts in, texts out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from core.cli.options import engine_config
from core.engine.llm import LLM
from core.engine.outputs import RequestOutput
from core.engine.resolve import Resolution
from core.sampling.params import SamplingParams
from core.scheduler import check_prompt_length
from core.tokenizer import chat_prompt, load_tokenizer


def complete(
    model: str, options: Mapping[str, Any], prompts: Sequence[str], params: SamplingParams, *, chat: bool
) -> None:
    """Print what follows each prompt. Interrupted, it shows what there is.

    Raises:
        CoreError: a prompt is wrong, before weights are read; whatever `LLM` raises.
    """
    config = engine_config(model, options)
    tokenizer = load_tokenizer(config.model, or_bytes=config.load_format == "dummy")
    ids = [
        chat_prompt(tokenizer, [{"role": "user", "content": p}]) if chat else tokenizer.encode(p)
        for p in prompts
    ]

    def check(resolution: Resolution) -> None:
        for prompt in ids:
            check_prompt_length(len(prompt), resolution.max_model_len)

    with LLM(
        model, **options, show_progress=sys.stderr.isatty(), tokenizer=tokenizer, on_resolved=check
    ) as llm:
        print(f"backend: {llm.engine.backend.name} ({llm.engine.choice_reason})", file=sys.stderr)
        if len(ids) == 1:
            _grow(llm, ids[0], params)
        else:
            _all(llm, ids, prompts, params)


def _grow(llm: LLM, ids: list[int], params: SamplingParams) -> None:
    shown = ""
    try:
        for output in llm.stream([ids], params):
            text = output.outputs[0].text
            print(text[len(shown) :], end="", flush=True)
            shown = text
    finally:
        print(flush=True)


def _all(llm: LLM, ids: list[list[int]], prompts: Sequence[str], params: SamplingParams) -> None:
    newest: dict[str, RequestOutput] = {}
    try:
        for output in llm.stream(ids, params):
            newest[output.request_id] = output
    finally:
        # Ids of requests count up in the order of the prompts.
        in_order = sorted(newest.values(), key=lambda output: int(output.request_id.rpartition("-")[2]))
        for given, output in zip(prompts, in_order, strict=False):
            print(f"--- {given}\n{output.outputs[0].text}", flush=True)
