"""`core chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from core.engine.llm import LLM
from core.sampling.params import SamplingParams


def talk(model: str, options: Mapping[str, Any], system: str, params: SamplingParams) -> None:
    """Read lines, answer each as it grows, and remember the conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    is_terminal = sys.stdin.isatty()
    with LLM(model, **options, show_progress=sys.stderr.isatty()) as llm:
        if is_terminal:
            print(f"{llm.engine.backend.name}, {llm.engine.dtype}; an empty line ends the conversation")
        while line := _read(is_terminal):
            messages.append({"role": "user", "content": line})
            shown = ""
            for output in llm.stream([llm.chat_prompt(messages)], params):
                text = output.outputs[0].text
                print(text[len(shown) :], end="", flush=True)
                shown = text
            print()
            messages.append({"role": "assistant", "content": shown})


def _read(is_terminal: bool) -> str:
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return ""
