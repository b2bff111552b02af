"""Commands. Each ends with status 0, or prints one sentence with a remedy and ends with status 1."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from core.cli.bench import bench
from core.cli.options import engine_config, print_choices, with_engine_options, with_options
from core.contract.errors import CoreError
from core.server.config import ServerConfig

app = typer.Typer(
    name="core",
    help="An inference engine for large language models whose hardware support is made of plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(bench, name="bench")

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
    """Continue prompts and print the texts: of one prompt as it grows, of several when all are done.

    Greedy and 64 tokens unless told otherwise (SamplingParams draws, and stops after 16).
    """
    from core.cli.generate import complete
    from core.sampling.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    complete(model, options, prompt, params, chat=chat)


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
    """Download the sample model (93 MB) into the cache folder. One that is there is checked."""
    from core.env import cache_dir
    from core.weights.sample import fetch_sample

    typer.echo(fetch_sample(cache_dir(), recheck=True))


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
        try:
            found = plugins.probe(spec.name, ProbeRequest())
        except CoreError as error:
            devices = f"failed: {error}"
        else:
            devices = (
                f"none: {found.reason}"
                if isinstance(found, Unavailable)
                else ", ".join(d.name for d in found)
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
@with_options(ServerConfig, "server")
@with_engine_options
def serve(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")],
    options: Options,
    server: Options,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what every option comes to, and end.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as the OpenAI API has it, until SIGINT or SIGTERM."""
    from core.engine.engine import explain as resolve_only
    from core.env import api_key

    name = server["served_model_name"] or Path(model).name
    config = ServerConfig(**{**server, "api_key": server["api_key"] or api_key(), "served_model_name": name})
    if explain:
        print_choices(resolve_only(engine_config(model, options)))
        return
    from core.server.run import bind
    from core.server.run import serve as run

    with bind(config) as listener:
        run(engine_config(model, options), config, listener, tell=typer.echo)


@app.command()
@with_engine_options
def chat(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")],
    options: Options,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass to draw from.")] = 0.95,
) -> None:
    """Talk with a model in the terminal; an empty line or the end of input ends it."""
    from core.cli.chat import talk
    from core.sampling.params import SamplingParams

    talk(
        model,
        options,
        system,
        SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p),
    )


@app.command()
@with_engine_options
def demo(
    options: Options,
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")] = "sample",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 64,
) -> None:
    """Serve on loopback, send eight chats at once, and show every stream as it grows."""
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
