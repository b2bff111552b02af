"""`core chat`: an interrupt ends an answer, not the conversation; at the prompt it ends that."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.cli.chat import talk
from core.engine.engine import Engine
from core.engine.llm import LLM
from core.sampling.params import SamplingParams
from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

__all__ = ["tiny_folder"]

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS = {"backend": "cpu_reference", "dtype": "float32", "max_model_len": 128, "overlap": 2}
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(tiny_folder("llama"), tmp_path_factory.mktemp("chat") / "tiny"))
    return write_folder(path, byte_level(VOCAB), tokenizer_config={"chat_template": TEMPLATE})


Chat = Callable[..., list[list[dict[str, str]]]]


@pytest.fixture
def chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Hold a conversation of these lines, interrupted at these steps; gives the messages of each question."""

    def run(*lines: object, at: tuple[int, ...] = ()) -> list[list[dict[str, str]]]:
        asked: list[list[dict[str, str]]] = []
        said: Iterator[object] = iter(lines)
        steps, real_step, real_prompt = [0], Engine.step, LLM.chat_prompt

        def read(_: str) -> str:
            line = next(said)
            if isinstance(line, type) and issubclass(line, BaseException):
                raise line
            return str(line)

        def step(engine: Engine) -> Any:
            steps[0] += 1
            for _ in range(at.count(steps[0])):
                signal.raise_signal(signal.SIGINT)
            return real_step(engine)

        def prompt(llm: LLM, messages: list[dict[str, str]]) -> list[int]:
            asked.append([dict(m) for m in messages])
            return real_prompt(llm, messages)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(Engine, "step", step)
        monkeypatch.setattr(LLM, "chat_prompt", prompt)
        # A run in the background may ignore interrupts, and so would the command.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            talk(str(model), OPTIONS, "", PARAMS)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
        return asked

    return run


def test_an_interrupt_ends_the_answer_and_the_conversation_goes_on(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = chat("hello", "and", "")[1][1]["content"]
    capsys.readouterr()
    asked = chat("hello", "and", "more", "", at=(5,))
    assert [[m["role"][0] for m in one] for one in asked] == [list("u"), list("uau"), list("uauau")]
    cut, following = (asked[2][i]["content"] for i in (1, 3))
    assert 0 < len(cut) < len(whole) and whole.startswith(cut)
    assert len(following) > len(cut), "the next answer is whole"
    assert capsys.readouterr().out.startswith(f"{cut}\n{following}\n"), (
        "the conversation holds what was shown"
    )


def test_the_third_interrupt_of_an_answer_ends_the_command(chat: Chat) -> None:
    assert len(chat("hello", "and", "", at=(5, 5))) == 2
    with pytest.raises(KeyboardInterrupt):
        chat("hello", "and", "", at=(5, 5, 5))


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError, ""])
def test_at_the_prompt_an_interrupt_ends_the_conversation_as_its_end_does(chat: Chat, end: object) -> None:
    assert len(chat("hello", end, "never read")) == 1
