"""Who may import whom, what importing core loads, and whether entry points and links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("torch", "jax", "jaxlib", "triton", "tensorflow", "transformers")
# Frameworks that core never names; the others may be imported inside a function.
FOREIGN = ("torch", "torch_xla", "jax", "jaxlib", "triton", "tensorflow")
IMPORT_LIMIT_S = 0.3
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def imported_modules(source: str, package: str) -> set[str]:
    """Every module that a source names in an import, lazy and dynamic ones with a constant name included.

    `from a import b` counts as `a.b`, because b may be a module; relative imports start at `package`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def within(module: str, *packages: str) -> bool:
    """Whether a module is one of these packages or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def core_may(module: str) -> bool:
    """Core knows no backend, no suite and no framework."""
    return not within(module, "backends", "conformance", "tests", *FOREIGN)


def contract_may(module: str) -> bool:
    """The contract stands alone, because backends may import all of it."""
    return core_may(module) and (not within(module, "core") or within(module, "core.contract"))


def plugin_may(module: str) -> bool:
    """Of core, a plugin sees the contract; of the suite and the tests, nothing."""
    return not within(module, "conformance", "tests") and (
        not within(module, "core") or within(module, "core.contract")
    )


def suite_may(module: str) -> bool:
    """The conformance suite meets backends through their entry points alone."""
    return not within(module, "backends", "tests", *FOREIGN)


def violations(folder: str, allowed: Callable[[str], bool]) -> list[str]:
    """`file imports module` for what a folder's files may not import."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        refused = [m for m in imported_modules(path.read_text(), package) if not allowed(m)]
        found += [f"{path.relative_to(ROOT)} imports {module}" for module in sorted(refused)]
    return found


def backend_folders() -> list[str]:
    """Names of the folders that hold a backend's code."""
    root = ROOT / "backends"
    return sorted({path.relative_to(root).parts[0] for path in root.glob("*/**/*.py")})


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("core", core_may),
        ("core/contract", contract_may),
        ("backends", plugin_may),
        ("tests/plugins", plugin_may),
        ("examples", plugin_may),
        ("conformance", suite_may),
    ],
)
def test_a_folder_imports_only_what_its_layer_may_see(folder: str, allowed: Callable[[str], bool]) -> None:
    assert violations(folder, allowed) == []


def test_no_backend_imports_another() -> None:
    found = []
    for folder in backend_folders():
        mine = f"backends.{folder}"

        def own(module: str, mine: str = mine) -> bool:
            return not within(module, "backends") or within(module, mine)

        found += violations(f"backends/{folder}", own)
    assert found == []


def test_importing_core_is_quick_and_loads_no_framework() -> None:
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport core\nprint(time.perf_counter() - start)\n"
        f"print(*[name for name in {(*FRAMEWORKS, 'tokenizers', 'gguf', 'rich')!r} if name in sys.modules])"
    )
    runs = [run_python(code).split("\n") for _ in range(3)]
    assert [loaded for _, *loaded in runs if any(loaded)] == []
    assert min(float(seconds) for seconds, *_ in runs) < IMPORT_LIMIT_S


def test_no_module_of_core_loads_a_framework_when_imported() -> None:
    code = (
        "import importlib, pkgutil, sys, core\n"
        "modules = pkgutil.walk_packages(core.__path__, 'core.')\n"
        "names = [m.name for m in modules if '__main__' not in m.name]\n"
        "for name in names: importlib.import_module(name)\n"
        f"print(len(names), *[name for name in {FRAMEWORKS!r} if name in sys.modules])"
    )
    count, *loaded = run_python(code).split()
    assert int(count) >= len(list((ROOT / "core" / "contract").glob("*.py")))
    assert loaded == []


def test_a_backend_folder_and_its_entry_point_arrive_together() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["core.backends"]
    assert points == {name: f"backends.{name}.plugin" for name in backend_folders()}
    assert [name for name in points if not (ROOT / "backends" / name / "plugin.py").is_file()] == []


def test_backends_stay_a_namespace_package_so_that_a_vendor_may_add_to_it() -> None:
    assert [path.name for path in (ROOT / "backends").iterdir() if path.suffix == ".py"] == []


def test_relative_links_of_documents_lead_to_files() -> None:
    folders = ("docs", "backends", "conformance", "examples")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    assert pages, "no documents found"
    assert [broken for page in sorted(pages) for broken in broken_links(page)] == []


def broken_links(page: Path) -> list[str]:
    """`page: link` of each relative link to a file that does not exist; code blocks are no links."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = [link.split("#")[0] for link in LINK.findall(text) if not re.match(r"[a-z][a-z0-9+.-]*:", link)]
    return [f"{page.name}: {target}" for target in targets if target and not (page.parent / target).exists()]


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import torch.nn as nn", "core", "torch.nn"),
        ("def f():\n    from jax import numpy", "core.models", "jax.numpy"),
        ("from importlib import import_module\nimport_module('triton')", "core", "triton"),
        ("from .. import plugins", "core.models", "core.plugins"),
        ("from ..engine import llm", "core.models", "core.engine.llm"),
        ("from . import base", "core.models", "core.models.base"),
    ],
)
def test_the_import_check_finds_every_form(source: str, package: str, found: str) -> None:
    assert found in imported_modules(source, package)


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (core_may, ["backends.cpu.plugin", "conformance", "torch", "jax.numpy", "triton"]),
        (contract_may, ["core.env", "core", "backends", "torch"]),
        (plugin_may, ["core", "core.LLM", "core.plugins", "core.contracts", "conformance.cases"]),
        (suite_may, ["backends.cpu_reference", "torch"]),
    ],
)
def test_the_layers_refuse_planted_imports(allowed: Callable[[str], bool], refused: list[str]) -> None:
    assert [module for module in refused if allowed(module)] == []
    assert allowed("core.contract.types") and allowed("numpy")


def test_the_link_check_finds_a_planted_broken_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#top) [b](https://x.org/y.md) ```[c](none.md)``` [d](missing.md#part)\n")
    assert broken_links(page) == ["page.md: missing.md"]
