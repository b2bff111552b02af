"""Commands. Each ends with status 0, or prints one sentence with a remedy and ends with status 1."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from core.cli.bench import bench
from core.cli.options import engine_config, print_choices, with_engine_options, with_options
from core.contract.errors import CoreError
from core.engine.config import EngineConfig
from core.engine.queueing import Queueing
from core.sampling.params import SamplingParams
from core.server.config import ServerConfig, explained

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
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most.")
    ] = SamplingParams.max_tokens,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = SamplingParams.temperature,
    top_p: Annotated[float, typer.Option(help="Probability mass to draw from.")] = SamplingParams.top_p,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = SamplingParams.seed,
    chat: Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")] = False,
    priority: Annotated[
        list[int] | None,
        typer.Option(help="Lower goes first under --policy priority; once, or once for each prompt."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a text ends as it is; not given: no limit.")
    ] = Queueing.timeout_s,
    queue_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a prompt that has not begun is given up; not given: no limit."
        ),
    ] = Queueing.queue_timeout_s,
    cache_salt: Annotated[
        str, typer.Option(help="Cached prefixes are shared only under the same salt.")
    ] = Queueing.salt,
) -> None:
    """Continue prompts and print the texts in their order: as they grow on a terminal or with one prompt,
    else when all are complete. An interrupt prints what there is.

    What is not given is as in SamplingParams and LLM.generate: 16 tokens, drawn at temperature 1.
    """
    from core.cli.generate import Work, complete

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    work = Work(
        prompts=prompt,
        params=params,
        is_chat=chat,
        priority=tuple(priority or ()),
        queue_timeout_s=queue_timeout,
        timeout_s=timeout,
        salt=cache_salt,
    )
    complete(model, options, work)


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
        print_choices(resolution, resolution.choices)


@app.command("fetch-sample")
def fetch_sample_command() -> None:
    """Download the sample model (93 MB) into the cache folder, or check the one that is there.

    Size and SHA-256 are computed anew; what was found and is done goes to standard error, the path to
    standard output.
    """
    from core.env import cache_dir
    from core.weights.sample import recheck_sample

    typer.echo(recheck_sample(cache_dir(), lambda sentence: typer.echo(sentence, err=True)))


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
    from core.env import API_KEY, api_key

    name, is_given = Path(model).name, server["api_key"] is not None
    config = ServerConfig(**{**server, "api_key": server["api_key"] if is_given else api_key()})
    if explain:
        engine = engine_config(model, options)
        resolution = resolve_only(engine)
        source = "given" if is_given else API_KEY.name
        choices = explained(resolution, engine, config, model_name=name, key_source=source)
        print_choices(resolution, choices)
        return
    from core.server.run import bind
    from core.server.run import serve as run

    if config.served_model_name is None:
        config = replace(config, served_model_name=name)
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
    """Talk with a model in the terminal. Ctrl-C ends an answer that grows; at the prompt it ends the
    conversation, as an empty line and the end of input do.
    """
    from core.cli.chat import talk

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    talk(model, options, system, params)


@app.command()
@with_options(EngineConfig, "options", max_requests=8, max_model_len=2048)
def demo(
    options: Options,
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or `sample`.")] = "sample",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 64,
) -> None:
    """Serve on loopback, send eight chats at once, and show every stream as it grows.

    The server takes the engine options given here. Where they are not given, it runs eight requests at once
    at most, of 2048 tokens at most.
    """
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
