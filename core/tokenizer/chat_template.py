"""Chat templates: a model's Jinja template, rendered in a sandbox in a process of its own.

A template comes with the weights and a message comes over the network, so neither may reach Python, take long
or take much memory. Values are rebuilt from plain JSON types; the process (`template_worker.py`) is started
at first use, renders one conversation after the other, and is replaced when a template makes it pass a limit.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError, RequestError
from core.tokenizer.tokenizer import Tokenizer

MAX_SECONDS = 0.8
"""Of computing, for one conversation."""
MAX_TEMPLATE = 1 << 20
"""Characters of a template."""

# A busy machine may let a process wait much longer than it computes.
_PATIENCE_S = 30.0
_SCRIPT = Path(__file__).with_name("template_worker.py")


def apply_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Text of a conversation, ready for `Tokenizer.encode(..., add_special_tokens=False)`.

    Thread-safe; conversations are rendered one after the other.

    Args:
        messages: in order, each with `role`, `content` and what else the template knows; JSON values.
        add_generation_prompt: end with the opening of the model's turn.
        tools: JSON schemas of functions. variables: further names for the template (`enable_thinking`,
            `documents`); `add_generation_prompt` among them goes before the argument.

    Raises:
        ConfigError: the template has a syntax error, or is longer than `MAX_TEMPLATE`.
        RequestError: a variable has a name that is an argument's, the template refuses these messages, they
        are not JSON values, or it does what the
        sandbox forbids or takes more time, memory or text than it may.
    """
    if len(template) > MAX_TEMPLATE:
        raise ConfigError(
            f"the chat template has {len(template)} characters, {MAX_TEMPLATE} at most are read; use "
            "another one"
        )
    fixed = {
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    if taken := fixed.keys() & (variables or {}).keys():
        raise RequestError(
            f"the chat template's variable {min(taken)!r} cannot be given; it comes from the request's own "
            "fields or from the model"
        )
    free = {"documents": None, "add_generation_prompt": add_generation_prompt}
    names = {**free, **(variables or {}), **fixed}
    try:
        request = json.dumps({"template": template, "names": _plain(names), "seconds": MAX_SECONDS})
    except (RecursionError, ValueError) as e:
        raise RequestError(f"a message cannot be put into a chat template ({e}); send less of it") from None
    answer = json.loads(_PROCESS.ask(request.encode()))
    if "text" in answer:
        return str(answer["text"])
    if answer["kind"] == "syntax":
        raise ConfigError(f"the chat template has an error in {answer['message']}; use another template")
    raise RequestError(
        f"{answer['message']}; check the messages' roles and contents, or use another template"
    )


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation by the model's own template, ready for the model to answer.

    Raises:
        ConfigError: the model has no template. Otherwise as `apply_chat_template`.
    """
    template = (tokenizer.tool_template if tools else None) or tokenizer.chat_template
    if template is None:
        raise ConfigError(
            "the model has no chat template; give a prompt of your own (of a server, ask /v1/completions)"
        )
    text = apply_chat_template(
        template,
        [dict(message) for message in messages],
        add_generation_prompt=True,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        tools=tools,
        variables=variables,
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _plain(value: Any) -> Any:
    """A copy in exact JSON types, without the methods that subclasses may carry into the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    raise RequestError(
        f"a message holds a {type(value).__name__}; only JSON values can be put into a chat template"
    )


class _Process:
    """The rendering process, started when it is needed and again after its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes) -> bytes:
        """The answer to a request.

        Raises:
            RequestError: the process ended over it. ConfigError: it cannot be started.
        """
        with self._lock:
            message = len(request).to_bytes(8, "little") + request
            for is_fresh in (False, True):
                child = self._start()
                try:
                    self._write(child, message)
                    break
                except OSError:
                    # It ended while nothing was asked of it.
                    self._end()
                    if is_fresh:
                        raise RequestError(
                            "the process that renders chat templates ends at once; see its messages above"
                        ) from None
            return self._answer(child)

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        # A fork of this process must not share the pipes.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        if self._owner == os.getpid():
            self._end()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as e:
            raise ConfigError(
                f"the process that renders chat templates cannot be started ({e}); check {sys.executable}"
            ) from None
        if self._owner != os.getpid():
            atexit.register(self.close)
        self._owner = os.getpid()
        return self._child

    def _write(self, child: subprocess.Popen[bytes], message: bytes) -> None:
        rest = memoryview(message)
        while rest and child.stdin is not None:
            rest = rest[child.stdin.write(rest) :]

    def _answer(self, child: subprocess.Popen[bytes]) -> bytes:
        deadline = time.monotonic() + _PATIENCE_S
        head = self._read(child, 8, deadline)
        body = self._read(child, int.from_bytes(head, "little"), deadline) if head is not None else None
        if body is not None:
            return body
        in_time = time.monotonic() < deadline
        self._end()
        code = child.returncode
        if not in_time or code == -signal.SIGPROF:
            what = f"takes more than the {MAX_SECONDS} s that it may"
        else:
            what = f"ended its process (exit status {code})"
        raise RequestError(
            f"the chat template {what} with these messages; send less, or use another template"
        )

    def _read(self, child: subprocess.Popen[bytes], count: int, deadline: float) -> bytes | None:
        """That many bytes; None where the process ends or is too late."""
        pieces: list[bytes] = []
        while count and child.stdout is not None:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(child.stdout.fileno(), min(count, 1 << 20)) if ready else b""
            if not piece:
                return None
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        # Give a process that is ending by itself the time to say how.
        try:
            child.wait(0.2)
        except subprocess.TimeoutExpired:
            child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        child.wait()


_PROCESS = _Process()
