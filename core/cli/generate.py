"""`core generate`: prompts in, texts out.

Texts come in the order of the prompts. On a terminal, and where there is one prompt, they are written as they
grow: that of the first prompt whose text is not complete, while the others run on. Several texts that go to a
file or a pipe are written when all are complete. An interrupt writes what there is of each, in either case.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

from core.cli.options import engine_config
from core.contract.errors import ConfigError, CoreError, RequestError
from core.engine.bars import generating_bar
from core.engine.llm import LLM
from core.engine.queueing import Queueing, queueing_of
from core.engine.resolve import Resolution
from core.engine.stream import RequestStream
from core.sampling.params import SamplingParams
from core.tokenizer import Tokenizer, chat_prompt, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of the model.

    Attributes:
        priority: none, one for all prompts, or one each. is_chat: prompts go into the chat template.
        Others: as in `Queueing`.

    Raises:
        RequestError: a value is out of range, or there is another number of priorities than of prompts.
    """

    prompts: Sequence[str]
    params: SamplingParams
    is_chat: bool = False
    priority: Sequence[int] = ()
    queue_timeout_s: float | None = Queueing.queue_timeout_s
    timeout_s: float | None = Queueing.timeout_s
    salt: str = Queueing.salt

    def __post_init__(self) -> None:
        queueing_of(len(self.prompts), self.priorities, self.queue_timeout_s, self.timeout_s, self.salt)

    @property
    def priorities(self) -> Sequence[int] | int:
        """As `LLM.queue` takes them."""
        if len(self.priority) > 1:
            return self.priority
        return self.priority[0] if self.priority else Queueing.priority


def complete(model: str, options: Mapping[str, Any], work: Work) -> None:
    """Write what follows each prompt to standard output.

    Raises:
        CoreError: a prompt or option is wrong, before weights are read; whatever `LLM` raises.
    """
    config = engine_config(model, options)
    if work.priority and config.policy != "priority":
        raise ConfigError(
            f"a priority is given, but policy {config.policy!r} looks at none; add --policy priority"
        )
    tokenizer = load_tokenizer(config.model, or_bytes=config.load_format == "dummy")
    ids = [_ids(tokenizer, prompt, work.is_chat) for prompt in work.prompts]
    params = work.params.resolved(partial(tokenizer.encode, add_special_tokens=False))

    def check(resolution: Resolution) -> None:
        for number, prompt in enumerate(ids, start=1):
            try:
                resolution.check_ids(prompt, params)
                resolution.limits.check(len(prompt), params)
            except RequestError as error:
                where = f"prompt {number} of {len(ids)}: " if len(ids) > 1 else ""
                raise RequestError(f"{where}{error}") from None

    is_shown = sys.stderr.isatty()
    with LLM(model, **options, show_progress=is_shown, tokenizer=tokenizer, on_resolved=check) as llm:
        print(f"backend: {llm.engine.backend.name} ({llm.engine.choice_reason})", file=sys.stderr)
        streams = llm.queue(
            ids,
            params,
            priority=work.priorities,
            queue_timeout_s=work.queue_timeout_s,
            timeout_s=work.timeout_s,
            salt=work.salt,
        )
        _write(llm, streams, Texts(work.prompts, streams, sys.stdout), is_shown)


def _ids(tokenizer: Tokenizer, prompt: str, is_chat: bool) -> list[int]:
    if is_chat:
        return chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def _write(llm: LLM, streams: Sequence[RequestStream], texts: Texts, is_shown: bool) -> None:
    is_live = texts.is_live
    try:
        with generating_bar(len(streams), is_shown and not is_live) as advance:
            for output in llm.run(streams):
                if is_live:
                    texts.grow()
                if output.finished:
                    advance(len(output.outputs[0].token_ids))
    except (KeyboardInterrupt, CoreError) as error:
        texts.end()
        if isinstance(error, KeyboardInterrupt):
            tokens = sum(len(stream.output().outputs[0].token_ids) for stream in streams)
            print(f"interrupted after {tokens} tokens", file=sys.stderr)
        raise
    texts.end()
    for number, stream in enumerate(streams, start=1):
        ended = stream.output().outputs[0]
        if ended.finish_reason == "deadline":
            print(f"text {number} of {len(streams)} was ended by its time limit", file=sys.stderr)
        elif ended.finish_reason == "error":
            print(f"text {number} of {len(streams)} failed: {ended.stop_reason}", file=sys.stderr)


class Texts:
    """Writes texts in the order of their prompts, each after a line with its prompt where there are several.

    Attributes:
        is_live: whether texts are to be written as they grow.
    """

    def __init__(self, prompts: Sequence[str], streams: Sequence[RequestStream], out: TextIO) -> None:
        self.is_live = len(prompts) == 1 or out.isatty()
        self._prompts = prompts
        self._streams = streams
        self._out = out
        self._at = 0
        self._shown: int | None = None

    def grow(self) -> None:
        """Write what is new of the first text that is not complete, and all that are complete before it."""
        while self._at < len(self._streams):
            self._piece()
            if not self._streams[self._at].finished:
                break
            self._close()
        self._out.flush()

    def end(self) -> None:
        """Write what there is of every text. Idempotent."""
        while self._at < len(self._streams):
            self._piece()
            self._close()
        self._out.flush()

    def _piece(self) -> None:
        if self._shown is None:
            self._shown = 0
            if len(self._prompts) > 1:
                self._out.write(f"--- {self._prompts[self._at]}\n")
        text = self._streams[self._at].output().outputs[0].text
        start, self._shown = self._shown, len(text)
        self._out.write(text[start:])

    def _close(self) -> None:
        self._out.write("\n")
        self._at, self._shown = self._at + 1, None
