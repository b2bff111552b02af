"""`core demo`: eight prompts at once, each stream shown as it grows, with speed and KV blocks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.engine.llm import LLM
from core.engine.outputs import RequestOutput
from core.sampling.params import SamplingParams

_SYSTEM = "You are a helpful assistant. Answer in two or three short sentences."
_QUESTIONS = (
    "Why is the sky blue?",
    "What does a compiler do?",
    "How do bees find their way home?",
    "Name a good breakfast and say why.",
    "What is a prime number?",
    "Explain tides to a child.",
    "Why do leaves change colour in autumn?",
    "Give one tip for learning a language.",
)


def run(model: str, options: Mapping[str, Any], *, max_tokens: int) -> None:
    """Generate for eight prompts at once with a live display."""
    console = Console()
    console.print(f"loading {model} ...")
    length = options.get("max_model_len") or 2048
    with LLM(model, **{**options, "max_model_len": length, "max_requests": 8}) as llm:
        engine = llm.engine
        console.print(
            f"backend [bold]{engine.backend.name}[/bold] ({engine.choice_reason}), {engine.dtype}, "
            f"{engine.cache.num_tokens} KV tokens in {engine.cache.num_bytes / 2**20:.0f} MiB"
        )
        messages = ({"role": "system", "content": _SYSTEM},)
        prompts = [llm.chat_prompt([*messages, {"role": "user", "content": q}]) for q in _QUESTIONS]
        # The first answer puts the shared beginning of all prompts into the prefix cache.
        llm.generate([prompts[0]], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        outputs: dict[str, RequestOutput] = {}
        start, peak_shared = time.monotonic(), 0
        with Live(console=console, refresh_per_second=12, transient=False) as live:
            for output in llm.stream(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens)):
                outputs[output.request_id] = output
                peak_shared = max(peak_shared, engine.metrics().blocks_shared)
                seconds = time.monotonic() - start
                live.update(_picture(llm, list(outputs.values()), seconds, console.size))
        seconds = time.monotonic() - start
        if not console.is_terminal:
            console.print()
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs.values())
        first = max(o.metrics.first_token_s or 0.0 for o in outputs.values())
        console.print(
            f"{tokens} tokens in {seconds:.1f} s = {tokens / seconds:.0f} tokens/s; slowest first token "
            f"{first:.2f} s; at most {peak_shared} KV blocks shared"
        )


def _picture(llm: LLM, outputs: list[RequestOutput], seconds: float, size: ConsoleDimensions) -> Group:
    """Speed and blocks, then each stream: its end, where the terminal is too small for all of it."""
    question_width = max(len(q) for q in _QUESTIONS)
    streams = Table(box=None, show_header=False, padding=(0, 1))
    streams.add_column(style="cyan", no_wrap=True, width=question_width)
    streams.add_column(overflow="fold")
    room = max(1, (size.height - 2) // len(_QUESTIONS)) * max(8, size.width - question_width - 14)
    for output in sorted(outputs, key=lambda o: int(o.request_id.rsplit("-", 1)[1])):
        question = _QUESTIONS[(int(output.request_id.rsplit("-", 1)[1]) - 1) % len(_QUESTIONS)]
        text = output.outputs[0].text.strip().replace("\n", " ")
        text += "" if output.finished else " ..."
        streams.add_row(question, text if len(text) <= room else "..." + text[3 - room :])
    m = llm.engine.metrics()
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    status = Text(
        f"{tokens / max(seconds, 1e-9):5.0f} tokens/s   {m.num_running} running   "
        f"KV blocks: {m.blocks_used} used, {m.blocks_shared} shared, {m.blocks_cached} cached, of "
        f"{m.blocks_total}",
        style="bold green",
    )
    return Group(status, streams)
