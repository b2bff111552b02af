"""What proves the suite itself: planted faults, false alarms and mutants, over many seeds.

    python tools/faults.py [--jobs 2] [--seeds 20] [--out docs/conformance] [--work .faults] [NAME ...]

Each command runs in as many shards as there are jobs. What was ended goes on where it was, as long as the
commit is the same; CORE_COMMIT tells it, else git.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "third_party_backend"
CLEAN = ("cpu_reference", "cpu", "core_tile.plugin:")


@dataclass(frozen=True)
class Sweep:
    """A command of the suite that takes --shard and --out, and the file that all shards make together."""

    name: str
    arguments: tuple[str, ...]


def sweeps(seeds: int) -> list[Sweep]:
    """All of them, the longest first."""
    clean = [part for name in CLEAN for part in ("--backend", name)]
    few = str(max(1, seeds * 3 // 20))
    return [
        Sweep("zoo", ("zoo", "--seeds", str(seeds))),
        Sweep("alarms-engine", ("alarms", "--seeds", few, "--level", "L0..L5", "--jobs", "1", *clean)),
        Sweep("alarms", ("alarms", "--seeds", str(seeds), "--level", "L1..L2", "--jobs", "1", *clean)),
        Sweep("mutants", ("mutants",)),
    ]


def run(arguments: list[str], log: Path) -> int:
    """The exit status of `core conformance` with these arguments; its output goes to a file."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(EXAMPLE), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from core.cli import main; main()", "conformance", *arguments]
    with log.open("w", encoding="utf-8") as out:
        return subprocess.run(
            command, cwd=ROOT, env=settings, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def main() -> int:
    """0 where every fault and mutant was found and nothing raised a false alarm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="zoo, alarms-engine, alarms, mutants; not given: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance")
    parser.add_argument("--work", type=Path, default=ROOT / ".faults")
    given = parser.parse_args()
    known = sweeps(given.seeds)
    if wrong := set(given.names) - {sweep.name for sweep in known}:
        parser.error(f"no sweep {min(wrong)!r}; there are {', '.join(sweep.name for sweep in known)}")
    if "CORE_COMMIT" not in os.environ:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
        os.environ["CORE_COMMIT"] = found.stdout.strip()
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = [sweep for sweep in known if not given.names or sweep.name in given.names]
    shards = [(sweep, i) for sweep in chosen for i in range(1, given.jobs + 1)]
    start = time.monotonic()

    def one(work: tuple[Sweep, int]) -> None:
        sweep, i = work
        base = given.work / f"{sweep.name}-{i}-of-{given.jobs}"
        part = ["--shard", f"{i}/{given.jobs}", "--resume", "--out", f"{base}.json"]
        status = run([*sweep.arguments, *part], base.with_suffix(".log"))
        print(f"{time.monotonic() - start:6.0f} s  {base.name}: exit status {status}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, shards))
    worst = 0
    for sweep in chosen:
        parts = sorted(given.work.glob(f"{sweep.name}-*-of-{given.jobs}.json"))
        files = [text for part in parts for text in ("--from", str(part))]
        log = given.work / f"{sweep.name}.log"
        status = run([*sweep.arguments, *files, "--out", str(given.out / f"{sweep.name}.json")], log)
        worst = max(worst, status)
        print(f"{sweep.name}: exit status {status}\n{log.read_text(encoding='utf-8')[-2000:]}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
