"""Commands. Each ends with status 0, or prints one sentence with a remedy and ends with status 1."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from core.cli.options import engine_config, print_choices, with_engine_options
from core.contract.errors import CoreError

app = typer.Typer(
    name="core",
    help="An inference engine for large language models whose hardware support is made of plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Options = dict[str, Any]
_INDENT = " " * 12


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False) -> None:
    """Options of every command."""


@app.command()
@with_engine_options
def generate(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it again for several at once.")],
    options: Options,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability mass to draw from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    chat: Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")] = False,
) -> None:
    """Continue one or several prompts and print the texts."""
    from core.engine.llm import LLM
    from core.sampling.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM(model, **options, show_progress=sys.stderr.isatty()) as llm:
        typer.echo(f"backend: {llm.engine.backend.name} ({llm.engine.choice_reason})", err=True)
        if chat:
            outputs = llm.chat([[{"role": "user", "content": p}] for p in prompt], params)
        else:
            outputs = llm.generate(prompt, params)
    for given, output in zip(prompt, outputs, strict=True):
        if len(prompt) > 1:
            typer.echo(f"--- {given}")
        for choice in output.outputs:
            typer.echo(choice.text)


@app.command("explain")
@with_engine_options
def explain_command(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")],
    options: Options,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what every option comes to for this model on this machine, and why. Loads nothing."""
    from core.engine.engine import explain

    resolution = explain(engine_config(model, options))
    if as_json:
        typer.echo(json.dumps([asdict(c) for c in resolution.choices], indent=2))
    else:
        print_choices(resolution)


@app.command("fetch-sample")
def fetch_sample_command() -> None:
    """Download the sample model (93 MB) into the cache folder."""
    from core.env import cache_dir
    from core.weights.sample import resolve_model

    typer.echo(resolve_model("sample", cache_dir()))


@app.command()
def backends() -> None:
    """List installed backends: devices found, or why there are none."""
    from rich.console import Console
    from rich.table import Table

    from core.contract.requests import ProbeRequest
    from core.contract.types import Unavailable
    from core.plugins import Plugins

    plugins = Plugins()
    plugins.load()
    table = Table("backend", "framework", "auto rank", "devices", "summary", box=None)
    for spec in plugins.specs():
        found = plugins.probe(spec.name, ProbeRequest())
        devices = (
            f"none: {found.reason}" if isinstance(found, Unavailable) else ", ".join(d.name for d in found)
        )
        rank = "only by name" if spec.auto_rank is None else str(spec.auto_rank)
        table.add_row(spec.name, spec.framework, rank, devices, spec.summary)
    for failure in plugins.failures:
        table.add_row(failure.name, "", "", f"not loaded: {failure.reason}", "")
    Console().print(table)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check every backend: load, probe, and one real product on each device. Status 1 if an available one
    fails.
    """
    from core.cli.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([asdict(c) for c in checks], indent=2))
    else:
        width = shutil.get_terminal_size().columns
        for c in checks:
            typer.echo(f"{c.status:<11} {c.backend} {c.device}")
            typer.echo(textwrap.fill(c.detail, width, initial_indent=_INDENT, subsequent_indent=_INDENT))
    if any(c.status == "FAIL" for c in checks):
        raise typer.Exit(1)


@app.command()
@with_engine_options
def demo(
    options: Options,
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")] = "sample",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 64,
) -> None:
    """Answer eight prompts at once and show every stream as it grows."""
    from core.cli.demo import run

    run(model, options, max_tokens=max_tokens)


def main() -> None:
    """Entry point of the `core` command."""
    show_traceback = "--debug" in sys.argv
    try:
        _add_plugin_commands()
        app()
    except CoreError as error:
        if show_traceback:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        if show_traceback:
            raise
        typer.echo(
            f"error: unexpected {type(error).__name__}: {error}; run `core --debug ...` for the traceback",
            err=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _add_plugin_commands() -> None:
    from core.plugins import Plugins

    plugins = Plugins()
    plugins.load()
    plugins.cli(app)
