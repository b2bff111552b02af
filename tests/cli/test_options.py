"""What the user says of the engine reaches it, from every command; each command's defaults are its help's."""

from __future__ import annotations

import inspect
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from core.cli.app import app
from core.cli.options import as_arguments
from core.contract.errors import ConfigError, RequestError
from core.engine.config import EngineConfig
from core.engine.llm import LLM
from core.sampling.params import SamplingParams
from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

__all__ = ["tiny_folder"]

GIVEN: dict[str, Any] = {
    "backend": "cpu",
    "device": 1,
    "dtype": "float32",
    "load_format": "dummy",
    "quantized": "packed",
    "max_model_len": 300,
    "max_requests": 3,
    "max_batch_tokens": 99,
    "block_size": 8,
    "num_blocks": 77,
    "kv_cache_bytes": 5,
    "prefix_cache": False,
    "policy": "priority",
    "max_waiting": 6,
    "overlap": 2,
    "tensor_parallel": 2,
    "num_threads": 4,
    "batch_invariant": True,
    "warm_up": True,
    "backend_options": {"a": "b=c", "d": ""},
}


def invoke(*arguments: str) -> None:
    """Run a command; what it raises comes out."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_options_survive_the_way_to_another_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(GIVEN) == {f.name for f in fields(EngineConfig)} - {"model"}
    told: list[Any] = []
    monkeypatch.setattr("core.cli.generate.complete", lambda *given: told.append(given[1]))
    invoke("generate", "m", "--prompt", "x", *as_arguments(GIVEN))
    assert told == [GIVEN]
    defaults = {f.name: f.default for f in fields(EngineConfig) if f.name != "model"} | {
        "backend_options": {}
    }
    invoke("generate", "m", "--prompt", "x", *as_arguments(defaults))
    assert told[1] == defaults


@pytest.mark.parametrize(
    ("arguments", "requests", "length"),
    [((), 8, 2048), (("--max-requests", "3"), 3, 2048), (("--max-model-len", "100"), 8, 100)],
)
def test_the_demo_serves_with_what_was_given_and_else_with_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], requests: int, length: int
) -> None:
    class Ended(Exception):
        """The server is not started here."""

    started: list[str] = []

    async def start(*command: str, **_: Any) -> None:
        started.extend(command)
        raise Ended

    monkeypatch.setattr("core.cli.demo.asyncio.create_subprocess_exec", start)
    with pytest.raises(Ended):
        invoke("demo", "m", "--backend", "cpu", "--num-threads", "2", "--no-prefix-cache", *arguments)
    assert {f"--max-requests={requests}", f"--max-model-len={length}"} <= set(started)
    assert {"--backend=cpu", "--num-threads=2", "--no-prefix-cache"} <= set(started)
    assert started[3:7] == ["serve", "m", "--port", "0"]


def test_the_demo_refuses_a_wrong_number_of_tokens_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.cli.demo.asyncio.run", lambda _: pytest.fail("it was started"))
    with pytest.raises(RequestError, match="max_tokens is 0"):
        invoke("demo", "--max-tokens", "0")


def test_commands_have_the_configurations_defaults_unless_their_help_says_otherwise() -> None:
    others = {"demo": {"max_requests": 8, "max_model_len": 2048}}
    for name in ("generate", "chat", "demo", "serve", "explain"):
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        found = {p.name: p.default for p in command.params if p.name in GIVEN and p.name != "backend_options"}
        wanted = {f.name: f.default for f in fields(EngineConfig) if f.name in found}
        assert found == wanted | others.get(name, {}), name
        assert all(p.show_default for p in command.params if p.name in others.get(name, {}))


def test_generate_asks_what_the_python_api_asks_where_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("core.cli.generate.complete", lambda *given: told.append(given[2]))
    invoke("generate", "m", "--prompt", "x")
    assert told[0].params == SamplingParams()
    asked = inspect.signature(LLM.queue).parameters
    found = {"priority": told[0].priorities, "salt": told[0].salt}
    found |= {name: getattr(told[0], name) for name in ("timeout_s", "queue_timeout_s")}
    assert found == {name: asked[name].default for name in found}
    shown = {p.name: p.default for p in get_command(app).commands["generate"].params}  # type: ignore[attr-defined]
    shared = {f.name: f.default for f in fields(SamplingParams) if f.name in shown}
    assert len(shared) == 4 and shared == {name: shown[name] for name in shared}


@pytest.fixture
def served(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str | None], Path]:
    """A tiny model with a tokenizer and this chat template."""

    def folder(template: str | None) -> Path:
        path = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "tiny"))
        config = {} if template is None else {"tokenizer_config": {"chat_template": template}}
        return write_folder(path, byte_level(VOCAB), **config)

    return folder


def test_a_chat_is_given_the_users_options(
    served: Callable[[str | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[EngineConfig] = []

    def engine(config: EngineConfig, **_: Any) -> None:
        told.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("core.engine.llm.Engine", engine)
    path = served("{{ messages[-1]['content'] }}")
    for arguments, wanted in (((), 64), (("--max-requests", "3"), 3)):
        with pytest.raises(ConfigError, match="far enough"):
            invoke("chat", str(path), *arguments)
        assert told[-1].max_requests == wanted


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (None, (), "has no chat template"),
        ("{{ raise_exception('no system') }}", ("--system", "Be kind."), "no system"),
        ("{{ messages[0]['content'] }}", ("--system", "word " * 80), "tokens; it must have 1 to 63"),
        ("x", ("--temperature", "nan"), "temperature is nan"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_before_weights_are_read(
    served: Callable[[str | None], Path],
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr("core.executor.rank.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    path = served(template)
    with pytest.raises((ConfigError, RequestError), match=words):
        invoke("chat", str(path), "--backend", "cpu_reference", "--max-model-len", "64", *arguments)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(served: Callable[[str | None], Path]) -> None:
    path = served("{% for m in messages %}{{ m.content }}{% endfor %}")
    # A test run in the background ignores interrupts, and so would this process.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from core.cli import main; main()"
    arguments = ["chat", str(path), "--backend", "cpu_reference", "--max-tokens", "400", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    for _ in range(2):
        process.stdin.write(b"the quick\n")
        process.stdin.flush()
        assert process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().endswith(b"\n")
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, b""), errors.decode()


def test_latency_uses_the_prefix_cache_where_it_is_asked_to(
    served: Callable[[str | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[EngineConfig] = []

    def engine(config: EngineConfig, **_: Any) -> None:
        told.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("core.engine.llm.Engine", engine)
    path = served("x")
    for arguments in ((), ("--prefix-cache",)):
        with pytest.raises(ConfigError, match="far enough"):
            invoke("bench", "latency", str(path), *arguments)
    assert [config.prefix_cache for config in told] == [False, True]


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--request-rate is 0; a number above 0"):
        invoke("bench", "serve", "--request-rate", "0")


@pytest.mark.parametrize("name", ["throughput", "latency"])
def test_a_measurement_that_does_not_fit_is_refused_before_weights_are_read(
    served: Callable[[str | None], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("core.executor.rank.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    command = ["bench", name, str(served(None)), "--backend", "cpu_reference", "--max-model-len", "64"]
    with pytest.raises(RequestError, match="the prompt has 64 tokens; it must have 1 to 63"):
        invoke(*command, "--input-len", "64")
    with pytest.raises(RequestError, match="17 tokens of prompt and output do not fit the KV cache"):
        invoke(*command, "--input-len", "10", "--output-len", "7", "--num-blocks", "2")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, option) for name in ("throughput", "latency") for option in ("--output-len", "--input-len")),
        ("throughput", "--num-prompts"),
        ("latency", "--iterations"),
        ("latency", "--batch-size"),
        ("startup", "--iterations"),
        ("serve", "--num-prompts"),
        ("serve", "--max-concurrency"),
        ("serve", "--vocab-size"),
    ],
)
def test_a_measurement_of_nothing_is_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    for started in ("core.engine.llm.LLM", "core.cli.bench._one_start", "core.cli.bench._load"):
        monkeypatch.setattr(started, lambda *a, **k: pytest.fail("it was started"))
    command = ["bench", name, *(() if name == "serve" else ("m",)), option, "0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and option.removeprefix("--") in done.output


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_requests_that_never_arrive_are_refused(rate: str) -> None:
    with pytest.raises(ConfigError, match="--request-rate is"):
        invoke("bench", "serve", "--request-rate", rate)


@pytest.mark.parametrize(("given", "wanted"), [((), False), (("--prefix-cache",), True)])
def test_a_latency_is_measured_with_the_prefix_cache_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], wanted: bool
) -> None:
    class Ended(Exception):
        """Far enough."""

    told: list[Any] = []

    def load(model: str, **options: Any) -> None:
        told.append(options["prefix_cache"])
        raise Ended

    monkeypatch.setattr("core.engine.llm.LLM", load)
    with pytest.raises(Ended):
        invoke("bench", "latency", "m", *given)
    assert told == [wanted]
