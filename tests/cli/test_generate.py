"""`core generate`: when texts are written, what an interrupt leaves, and what is refused before loading."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.cli.app import app
from core.cli.generate import Work, complete
from core.contract.errors import ConfigError, RequestError
from core.engine.engine import Engine
from core.engine.llm import LLM
from core.sampling.params import SamplingParams
from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

__all__ = ["tiny_folder"]

PROMPTS = ("the quick brown", "over the lazy dog", "don't stop")
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, skip_special_tokens=False)
OPTIONS = {"backend": "cpu_reference", "dtype": "float32", "max_model_len": 64, "overlap": 1}


@pytest.fixture(scope="module")
def served(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and no chat template."""
    path = tmp_path_factory.mktemp("generate") / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    return write_folder(path, byte_level(VOCAB))


class Out(io.StringIO):
    """Standard output that remembers how many steps the engine had done at each write of something."""

    def __init__(self, played: Played, is_terminal: bool) -> None:
        super().__init__()
        self._played = played
        self._is_terminal = is_terminal
        self.moments: list[int] = []

    def isatty(self) -> bool:
        """As the test wants it."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Remember when."""
        if text:
            self.moments.append(self._played.steps)
        return super().write(text)


@dataclass
class Played:
    """A run of the command: `steps` of the engine, the last of which is interrupted where `stop` says so."""

    monkeypatch: pytest.MonkeyPatch
    model: Path
    steps: int = 0
    stop: int | None = None
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def run(self, prompts: tuple[str, ...], *, is_terminal: bool, **asked: Any) -> Out:
        """What was written."""
        real, self.steps = Engine.step, 0

        def step(engine: Engine) -> Any:
            if self.steps == self.stop:
                raise KeyboardInterrupt
            self.steps += 1
            return real(engine)

        out = Out(self, is_terminal)
        with self.monkeypatch.context() as patch:
            patch.setattr(Engine, "step", step)
            patch.setattr(sys, "stdout", out)
            work = Work(prompts=prompts, params=PARAMS, **asked)
            if self.stop is None:
                complete(str(self.model), self.options, work)
            else:
                with pytest.raises(KeyboardInterrupt):
                    complete(str(self.model), self.options, work)
        return out


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, served: Path) -> Played:
    return Played(monkeypatch, served)


def texts(out: Out) -> list[str]:
    """The text of each prompt, of output with a line for each."""
    found = out.getvalue()
    for prompt in PROMPTS:
        assert found.count(f"--- {prompt}\n") == 1
    parts = [part.partition("\n")[2] for part in found.split("--- ")[1:]]
    assert all(part.endswith("\n") for part in parts)
    return [part[:-1] for part in parts]


def test_one_text_is_written_as_it_grows_wherever_it_goes(played: Played) -> None:
    for is_terminal in (True, False):
        out = played.run(PROMPTS[:1], is_terminal=is_terminal)
        assert len(set(out.moments)) > 5 and min(out.moments) <= 3
        assert not out.getvalue().startswith("---") and out.getvalue().endswith("\n")


def test_several_are_written_as_they_grow_on_a_terminal_and_at_the_end_elsewhere(played: Played) -> None:
    live = played.run(PROMPTS, is_terminal=True)
    assert len(set(live.moments)) > 5 and min(live.moments) <= 3
    whole = played.run(PROMPTS, is_terminal=False)
    assert set(whole.moments) == {played.steps}
    assert live.getvalue() == whole.getvalue(), "both write the same"
    with LLM(played.model, **OPTIONS, show_progress=False) as llm:
        assert texts(live) == [o.outputs[0].text for o in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_interrupt_leaves_what_there_is_of_each_text_under_its_own_prompt(
    played: Played, is_terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = texts(played.run(PROMPTS, is_terminal=False))
    played.stop = 9
    # One at a time, and the last one first: what has not begun is not mistaken for what has.
    played.options |= {"max_requests": 1, "policy": "priority"}
    found = texts(played.run(PROMPTS, is_terminal=is_terminal, priority=(3, 2, 1)))
    assert found[:2] == ["", ""]
    assert 0 < len(found[2]) < len(whole[2]) and whole[2].startswith(found[2])
    assert "interrupted after 9 tokens" in capsys.readouterr().err


def test_a_text_that_its_time_limit_ended_is_told(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    out = played.run(PROMPTS[:1], is_terminal=False, timeout_s=0.0)
    assert out.getvalue() == "\n"
    assert "text 1 of 1 was ended by its time limit" in capsys.readouterr().err


def test_the_command_hands_on_all_that_may_be_said_of_a_request(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("core.cli.generate.complete", lambda *given: asked.extend(given))
    done = CliRunner().invoke(
        app,
        [
            *(
                "generate",
                str(served),
                "--prompt",
                "a",
                "--prompt",
                "b",
                "--priority",
                "2",
                "--priority",
                "1",
            ),
            *("--timeout", "9", "--queue-timeout", "3", "--cache-salt", "mine", "--temperature", "0.5"),
        ],
    )
    assert done.exit_code == 0, done.output
    work = asked[2]
    assert (work.prompts, work.priorities) == (["a", "b"], (2, 1))
    assert (work.timeout_s, work.queue_timeout_s, work.salt) == (9, 3, "mine")
    assert work.params.temperature == 0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "0"), r"top_p is 0\.0"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--timeout", "nan"), "timeout_s is nan"),
        (("--queue-timeout", "-1"), r"queue_timeout_s is -1\.0"),
        (("--priority", "1", "--priority", "2", "--priority", "3"), "3 priorities were given for 2 prompts"),
        (("--priority", "1"), "policy 'fcfs' looks at none; add --policy priority"),
        (("--prompt", ""), "prompt 3 of 3: the prompt has 0 tokens"),
        (("--num-blocks", "2"), "prompt 1 of 2: 17 tokens of prompt and output do not fit the KV cache"),
        (("--prompt", "word " * 80), "prompt 3 of 3: the prompt has [0-9]+ tokens; it must have 1 to 63"),
    ],
)
def test_what_is_wrong_is_refused_before_weights_are_read(
    served: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr("core.executor.rank.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    options = ("--backend", "cpu_reference", "--max-model-len", "64")
    command = ["generate", str(served), "--prompt", "a", "--prompt", "b", *options, *given]
    with pytest.raises((RequestError, ConfigError), match=words):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_an_id_outside_the_vocabulary_is_refused_before_weights_are_read(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.executor.rank.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    monkeypatch.setattr(
        "core.tokenizer.tokenizer.FastTokenizer.encode",
        lambda self, text, add_special_tokens=True: [5, VOCAB],
    )
    with pytest.raises(
        RequestError, match=f"prompt token id {VOCAB} is outside the vocabulary of {VOCAB} ids"
    ):
        complete(str(served), OPTIONS, Work(prompts=["a"], params=PARAMS))
