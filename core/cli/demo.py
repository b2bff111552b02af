"""`core demo`: a server on loopback, eight chats at once, each stream shown as it grows."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.cli.options import as_arguments
from core.contract.errors import DeviceError
from core.sampling.params import SamplingParams
from core.server.client import Answer, Client

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
_QUESTION_WIDTH = max(len(q) for q in _QUESTIONS)


@dataclass
class _Board:
    """What is shown."""

    answers: dict[str, Answer] = field(default_factory=lambda: {q: Answer() for q in _QUESTIONS})
    figures: Mapping[str, float] = field(default_factory=dict)
    peak_used: float = 0
    peak_shared: float = 0
    pieces: int = 0
    start: float = field(default_factory=time.monotonic)

    def take(self, figures: Mapping[str, float]) -> None:
        """Newest figures of the server."""
        self.figures = figures
        self.peak_used = max(self.peak_used, figures.get("core_kv_blocks_used", 0))
        self.peak_shared = max(self.peak_shared, figures.get("core_kv_blocks_shared", 0))

    def picture(self, size: ConsoleDimensions) -> Group:
        """Speed and blocks, then each stream: its end, where the terminal is too small for all of it."""
        streams = Table(box=None, show_header=False, padding=(0, 1))
        streams.add_column(style="cyan", no_wrap=True, width=_QUESTION_WIDTH)
        streams.add_column(overflow="fold")
        lines = max(1, (size.height - 2) // len(_QUESTIONS))
        room = lines * max(8, size.width - _QUESTION_WIDTH - 14)
        for question, answer in self.answers.items():
            text = answer.text.strip().replace("\n", " ") + ("" if answer.finish_reason else " ...")
            streams.add_row(question, text if len(text) <= room else "..." + text[3 - room :])
        speed = self.pieces / max(time.monotonic() - self.start, 1e-9)
        f = self.figures
        status = (
            f"{speed:5.0f} tokens/s   {f.get('core_num_requests_running', 0):.0f} running   KV blocks: "
            f"{f.get('core_kv_blocks_used', 0):.0f} used, {f.get('core_kv_blocks_shared', 0):.0f} shared, "
            f"of {f.get('core_kv_blocks_total', 0):.0f}"
        )
        return Group(Text(status, style="bold green"), streams)


def run(model: str, options: Mapping[str, Any], *, max_tokens: int) -> None:
    """Serve with these engine options, ask, show, and end the server.

    Raises:
        RequestError: `max_tokens` is out of range; nothing was started.
    """
    SamplingParams(max_tokens=max_tokens)
    asyncio.run(_run(model, options, max_tokens))


async def _run(model: str, options: Mapping[str, Any], max_tokens: int) -> None:
    console = Console()
    server, url = await _start(console, model, options)
    try:
        async with Client(url) as client:
            board = await _talk(console, client, max_tokens)
    finally:
        status = await _end(server)
    console.print(_closing_table(board))
    if status != 0:
        raise DeviceError(f"the server ended with status {status}; see its messages above")


async def _start(console: Console, model: str, options: Mapping[str, Any]) -> tuple[Process, str]:
    """A server on a free port of loopback, and its address."""
    arguments = ["serve", model, "--port", "0", *as_arguments(options)]
    code = "from core.cli import main; main()"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *arguments, stdout=PIPE)
    if process.stdout is None:
        raise DeviceError("the server has no output")
    async for raw in process.stdout:
        line = raw.decode().rstrip()
        console.print(line, markup=False, highlight=False)
        if line.startswith("serving "):
            return process, line.rsplit(" ", 1)[1]
    raise DeviceError(f"the server did not start (status {await process.wait()}); see its messages above")


async def _end(process: Process) -> int:
    if process.returncode is None:
        process.terminate()
    if process.stdout is not None:
        await process.stdout.read()
    return await process.wait()


async def _talk(console: Console, client: Client, max_tokens: int) -> _Board:
    # The first answer puts the shared beginning of all chats into the prefix cache.
    await client.ask("/v1/chat/completions", _body(_QUESTIONS[0], 1))
    board = _Board()

    async def follow(question: str) -> None:
        async for answer in client.stream("/v1/chat/completions", _body(question, max_tokens)):
            board.answers[question] = answer
            board.pieces = sum(len(a.times) for a in board.answers.values())

    async def watch() -> None:
        while True:
            board.take(await client.metrics())
            await asyncio.sleep(0.1)

    async def draw(live: Live) -> None:
        while True:
            live.update(board.picture(console.size))
            await asyncio.sleep(0.08)

    with Live(console=console, refresh_per_second=12, auto_refresh=console.is_terminal) as live:
        background = [asyncio.create_task(watch()), asyncio.create_task(draw(live))]
        try:
            async with asyncio.TaskGroup() as group:
                for question in _QUESTIONS:
                    group.create_task(follow(question))
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        board.take(await client.metrics())
        live.update(board.picture(console.size), refresh=True)
    if not console.is_terminal:
        console.print()
    return board


def _body(question: str, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": max_tokens}


def _closing_table(board: _Board) -> Table:
    answers = list(board.answers.values())
    tokens = sum(a.completion_tokens for a in answers)
    seconds = max(a.total_s for a in answers)
    firsts = sorted(a.first_s for a in answers)
    each = sorted(a.per_token_s for a in answers)
    table = Table("", "", box=None, show_header=False)
    table.add_row("chats", f"{len(answers)} at once, {tokens} tokens in {seconds:.1f} s")
    table.add_row("speed", f"{tokens / seconds:.0f} tokens/s")
    table.add_row(
        "time to first token", f"median {firsts[len(firsts) // 2]:.2f} s, slowest {firsts[-1]:.2f} s"
    )
    table.add_row("time per token after it", f"median {1000 * each[len(each) // 2]:.0f} ms")
    table.add_row("prompt tokens from the cache", f"{sum(a.cached_tokens for a in answers)}")
    table.add_row("KV blocks", f"at most {board.peak_used:.0f} used, {board.peak_shared:.0f} shared")
    return table
