"""Wheels in a clean environment: core and the example backend, as a user installs them, and the suite there.

    python tools/clean_room.py                                # core[conformance] and the example: L0 to L5
    python tools/clean_room.py --extras cpu,conformance --first torch==2.13.0

Builds both wheels, makes a virtual environment in a temporary folder, installs the wheels there with what
they need from the package index, and runs the conformance suite from that folder. Prints each step's time;
the first that fails ends it with status 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "third_party_backend"
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


def step(what: str, *command: str | Path, folder: Path) -> None:
    """Run a command in a folder, without what this environment tells Python; say how long it took."""
    start = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{what:<48} {time.monotonic() - start:6.1f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        sys.exit(f"{what}: status {done.returncode}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extras", default="conformance", help="of core, separated by commas")
    parser.add_argument(
        "--first", action="append", default=[], help="a requirement to install before; again for more"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels, python = folder / "wheels", folder / "clean" / "bin" / "python"
        for what, source in (("core", ROOT), ("the example", EXAMPLE)):
            step(
                f"wheel of {what}",
                sys.executable,
                *PIP,
                "wheel",
                "--no-deps",
                "-w",
                wheels,
                source,
                folder=folder,
            )
        step("a clean environment", sys.executable, "-m", "venv", folder / "clean", folder=folder)
        if arguments.first:
            step(
                f"{' '.join(arguments.first)}",
                python,
                *PIP,
                "install",
                "--quiet",
                *arguments.first,
                folder=folder,
            )
        core, example = (next(wheels.glob(pattern)) for pattern in ("core-*.whl", "core_backend_tile-*.whl"))
        wanted = f"{core}[{arguments.extras}]"
        step(
            f"core[{arguments.extras}] and the example",
            python,
            *PIP,
            "install",
            "--quiet",
            wanted,
            example,
            folder=folder,
        )
        runs = {"cpu_reference": "L0", "tile": "L0..L5"}
        if "cpu" in arguments.extras.split(","):
            runs["cpu"] = "L0..L5"
        for backend, levels in runs.items():
            suite = (
                folder / "clean" / "bin" / "core",
                "conformance",
                "run",
                "--backend",
                backend,
                "--level",
                levels,
            )
            step(f"{backend}, {levels}", *suite, "--jobs", "2", folder=folder)


if __name__ == "__main__":
    main()
