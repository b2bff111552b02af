"""Progress bars on stderr: while weights load, and while prompts are continued."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.weights.loader import LoadState, Progress

Advance = Callable[[int], None]


@contextmanager
def loading_bar(name: str, show: bool) -> Iterator[Progress | None]:
    """A bar of bytes, tensors and speed on stderr while weights load, and one line when they are there."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[phase]} {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        TextColumn("{task.fields[speed]:.2f} GB/s"),
    )
    last: LoadState | None = None
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None, tensors="0", speed=0.0, phase="loading")

        def tell(state: LoadState) -> None:
            nonlocal last
            last = state
            bar.update(
                task,
                phase=state.phase,
                completed=state.bytes_done,
                total=state.bytes_total,
                tensors=f"{state.tensors_done}/{state.tensors_total}",
                speed=state.bytes_per_s / 1e9,
            )

        yield tell
    if last is not None:
        sys.stderr.write(f"loaded {last.sentence()} in {last.seconds:.1f} s\n")


@contextmanager
def generating_bar(count: int, show: bool) -> Iterator[Advance]:
    """A bar of finished requests and speed on stderr; gives what is told the tokens of each as it ends."""
    if not show:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=count, speed=0.0)
        start, total = time.monotonic(), 0

        def advance(tokens: int) -> None:
            nonlocal total
            total += tokens
            bar.update(task, advance=1, speed=total / max(time.monotonic() - start, 1e-9))

        yield advance
