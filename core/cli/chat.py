"""`core chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from core.cli.options import engine_config
from core.engine.llm import LLM
from core.engine.resolve import Resolution
from core.sampling.params import SamplingParams
from core.scheduler import check_prompt_length
from core.tokenizer import chat_prompt, load_tokenizer


def talk(model: str, options: Mapping[str, Any], system: str, params: SamplingParams) -> None:
    """Read lines, answer each as it grows, and remember the conversation.

    Raises:
        ConfigError: the model has no chat template. RequestError: its template refuses the system message, or
            that is too long. Both before weights are read; then whatever `LLM` raises.
    """
    messages = [{"role": "system", "content": system}] if system else []
    is_terminal = sys.stdin.isatty()
    config = engine_config(model, options)
    tokenizer = load_tokenizer(config.model, or_bytes=config.load_format == "dummy")
    shortest = len(chat_prompt(tokenizer, [*messages, {"role": "user", "content": "?"}]))

    def check(resolution: Resolution) -> None:
        check_prompt_length(shortest, resolution.max_model_len)

    is_shown = sys.stderr.isatty()
    with LLM(model, **options, show_progress=is_shown, tokenizer=tokenizer, on_resolved=check) as llm:
        if is_terminal:
            print(f"{llm.engine.backend.name}, {llm.engine.dtype}; an empty line ends the conversation")
        while line := _read(is_terminal):
            messages.append({"role": "user", "content": line})
            shown = ""
            try:
                for output in llm.stream([llm.chat_prompt(messages)], params):
                    text = output.outputs[0].text
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            finally:
                print(flush=True)
            messages.append({"role": "assistant", "content": shown})


def _read(is_terminal: bool) -> str:
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return ""
