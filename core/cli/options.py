"""Options on the command line: one per field of a configuration record, made from it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from core.contract.errors import ConfigError
from core.engine.config import EngineConfig
from core.engine.resolve import Choice, Resolution

_PAIRS = "backend_options"


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every engine option but the model; it takes them as the mapping `options`."""
    return with_options(EngineConfig, "options")(command)


def with_options(
    record: type[Any], name: str, **defaults: int
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option per field of a record (but `model`); it takes them as the mapping `name`.

    Args:
        defaults: of options that have another default in this command than in the record; its help shows it.
    """
    return functools.partial(_with_options, record, name, defaults)


def _with_options(
    record: type[Any], name: str, defaults: Mapping[str, int], command: Callable[..., None]
) -> Callable[..., None]:
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != name]
    hints = get_type_hints(record)
    added = [
        _parameter(f, hints[f.name], defaults.get(f.name, None if f.default is MISSING else f.default))
        for f in fields(record)
        if f.name != "model"
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = {p.name: values.pop(p.name) for p in added}
        if _PAIRS in options:
            options[_PAIRS] = _pairs(options[_PAIRS])
        command(**values, **{name: options})

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *added]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """The configuration of these options for a model, which is fetched if it is the sample.

    Raises:
        ConfigError: there is no such model, or an option is out of range.
    """
    from core.env import cache_dir
    from core.weights.sample import resolve_model

    return EngineConfig.of({**options, "model": resolve_model(model, cache_dir())})


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """The arguments of a command line that give these engine options; None is left out."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name == _PAIRS:
            arguments += [f"--backend-option={key}={text}" for key, text in value.items()]
        elif isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    return arguments


def print_choices(resolution: Resolution, choices: Sequence[Choice]) -> None:
    """A table of options, values and reasons, then what the memory buys."""
    from rich.console import Console
    from rich.table import Table

    table = Table("option", "value", "why", box=None)
    for choice in choices:
        table.add_row(choice.option, choice.value, choice.why)
    console = Console()
    console.print(table)
    console.print(resolution.summary())


def _parameter(f: Any, hint: Any, default: Any) -> inspect.Parameter:
    help_text = str(f.metadata["meaning"])
    if f.metadata["otherwise"]:
        help_text += f"; not given: {f.metadata['otherwise']}"
    if f.name == _PAIRS:
        option = typer.Option("--backend-option", help=f"{help_text}: NAME=VALUE, once for each")
        return _keyword(f.name, Annotated[list[str], option], [])
    return _keyword(f.name, Annotated[_plain(hint), typer.Option(help=help_text)], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(hint: Any) -> Any:
    """The type as the command line takes it: texts for literals, which the configuration checks."""
    arguments = get_args(hint)
    if arguments and all(isinstance(a, str) for a in arguments):
        return str
    return str if hint is Path else hint


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"--backend-option is {text!r}; it must be NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)
