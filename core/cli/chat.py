"""`core chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from core.cli.options import engine_config
from core.engine.llm import LLM
from core.engine.resolve import Resolution
from core.sampling.params import SamplingParams
from core.tokenizer import chat_prompt, load_tokenizer


def talk(model: str, options: Mapping[str, Any], system: str, params: SamplingParams) -> None:
    """Read lines, answer each as it grows, and remember the conversation.

    An interrupt ends an answer that grows, which stays in the conversation as far as it came. At the prompt
    it ends the conversation.

    Raises:
        ConfigError: the model has no chat template. RequestError: its template refuses the system message, or
            that is too long. Both before weights are read; then whatever `LLM` raises.
    """
    messages = [{"role": "system", "content": system}] if system else []
    is_terminal = sys.stdin.isatty()
    config = engine_config(model, options)
    tokenizer = load_tokenizer(config.model, or_bytes=config.load_format == "dummy")
    shortest = chat_prompt(tokenizer, [*messages, {"role": "user", "content": "?"}])

    def check(resolution: Resolution) -> None:
        resolution.check_ids(shortest, params)
        resolution.limits.check(len(shortest), params)

    is_shown = sys.stderr.isatty()
    with LLM(model, **options, show_progress=is_shown, tokenizer=tokenizer, on_resolved=check) as llm:
        if is_terminal:
            print(
                f"{llm.engine.backend.name}, {llm.engine.dtype}; Ctrl-C ends an answer, an empty line the "
                "conversation"
            )
        while line := _read(is_terminal):
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """The answer, printed as it grows. An interrupt ends it where it is, and the conversation goes on."""
    shown = ""
    interrupts = Interrupts()
    try:
        with interrupts, closing(llm.stream([llm.chat_prompt(messages)], params)) as outputs:
            for output in outputs:
                text = output.outputs[0].text
                print(text[len(shown) :], end="", flush=True)
                shown = text
                if interrupts.count:
                    break
    finally:
        print(flush=True)
    return shown


class Interrupts:
    """Counts interrupts (Ctrl-C) while it is open, so that none cuts a step of the engine in two.

    The third one is raised: the engine does not answer.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._take)

    def _take(self, *_: object) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self._before not in (None, signal.SIG_IGN):
            signal.signal(signal.SIGINT, self._before)


def _read(is_terminal: bool) -> str:
    """A line; "" at its end, or where an interrupt comes in place of one."""
    try:
        return input("> " if is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            print()
        return ""
