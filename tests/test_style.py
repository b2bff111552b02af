"""The rules of style that a machine can check. As a script: prints the longest files and functions."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import env

ROOT = Path(__file__).resolve().parent.parent
CODE = ("core", "backends", "conformance")
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 100
MAX_ENV_VARS = 12
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".txt", ".json", ".toml", ".lock", ".jinja"}
VENDOR_WORDS = frozenset(
    {
        "amd",
        "ascend",
        "cann",
        "cuda",
        "gaudi",
        "gpu",
        "habana",
        "hip",
        "hpu",
        "intel",
        "npu",
        "nvidia",
        "rocm",
    }
    | {"spyre", "tpu", "triton", "xla"}
)
NEUTRAL_BACKENDS = {"cpu", "cpu_reference"}


def python_files(*folders: str) -> list[Path]:
    """All Python files below these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """The path as a message shows it."""
    return str(path.relative_to(ROOT))


def longest_files() -> list[tuple[int, str]]:
    """(lines, file) of all code, longest first."""
    return sorted(((len(p.read_text().splitlines()), name_of(p)) for p in python_files(*CODE)), reverse=True)


def functions(source: str) -> Iterator[tuple[int, int, str]]:
    """(lines with decorators, first line, name) of each function, methods and inner functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield (node.end_lineno or first) - first + 1, first, node.name


def longest_functions() -> list[tuple[int, str]]:
    """(lines, where) of all functions, longest first."""
    found = [
        (length, f"{name_of(path)}:{line} {name}")
        for path in python_files(*CODE)
        for length, line, name in functions(path.read_text())
    ]
    return sorted(found, reverse=True)


def report() -> str:
    """The ten longest files and functions."""
    lines = []
    for title, rows, limit in (
        ("files", longest_files(), MAX_FILE_LINES),
        ("functions", longest_functions(), MAX_FUNCTION_LINES),
    ):
        lines.append(f"longest {title} (lines, limit {limit})")
        lines += [f"  {length:4}  {where}" for length, where in rows[:10]]
    return "\n".join(lines)


def vendor_words(text: str, words: frozenset[str] = VENDOR_WORDS) -> list[str]:
    """`line: word` of each vendor word: alone, plural, before a digit, or as part of an identifier."""
    pattern = re.compile(rf"(?<![a-z])({'|'.join(sorted(words))})s?(?![a-z])", re.IGNORECASE)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", line)
        hits = {m.group(1).lower() for given in (line, parts) for m in pattern.finditer(given)}
        found += [f"{number}: {word}" for word in sorted(hits)]
    return found


def statements(source: str, kind: type[ast.stmt]) -> list[int]:
    """Lines of the statements of a kind."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]


def environment_uses(source: str) -> list[int]:
    """Lines that name a way to the process's environment."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            used = node.attr in names
        elif isinstance(node, ast.ImportFrom):
            used = node.module in ("os", "posix") and any(alias.name in names for alias in node.names)
        else:
            used = False
        if used:
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return sorted(lines)


def test_no_file_is_longer_than_the_limit() -> None:
    print(report())
    assert longest_files(), "no code found"
    assert [row for row in longest_files() if row[0] > MAX_FILE_LINES] == []


def test_no_function_is_longer_than_the_limit() -> None:
    print(report())
    assert longest_functions(), "no functions found"
    assert [row for row in longest_functions() if row[0] > MAX_FUNCTION_LINES] == []


def test_core_names_no_vendor() -> None:
    folders = {p.name for p in (ROOT / "backends").iterdir() if p.is_dir() and not p.name.startswith("_")}
    words = VENDOR_WORDS | (folders - NEUTRAL_BACKENDS)
    files = [p for p in sorted((ROOT / "core").rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    found = [f"{name_of(p)} (its name)" for p in files if vendor_words(name_of(p), words)]
    for path in files:
        if path.suffix in TEXT_SUFFIXES:
            found += [f"{name_of(path)}:{hit}" for hit in vendor_words(path.read_text(), words)]
    assert found == []


@pytest.mark.parametrize("kind", [ast.Global, ast.Assert])
def test_code_has_no_global_statement_and_no_assert(kind: type[ast.stmt]) -> None:
    """A suite's own checks may assert; the engine and the backends raise typed errors."""
    folders = ("core", "backends") if kind is ast.Assert else CODE
    found = [
        f"{name_of(path)}:{line}"
        for path in python_files(*folders)
        for line in statements(path.read_text(), kind)
    ]
    assert found == []


def test_one_module_of_core_reads_the_environment() -> None:
    users = [name_of(path) for path in python_files("core") if environment_uses(path.read_text())]
    assert users == ["core/env.py"]


def test_environment_variables_are_few_and_all_in_the_table() -> None:
    defined = [value for value in vars(env).values() if isinstance(value, env.EnvVar)]
    assert sorted(v.name for v in env.TABLE) == sorted(v.name for v in defined)
    assert len(env.TABLE) <= MAX_ENV_VARS
    assert [v.name for v in env.TABLE if not v.name.startswith("CORE_") or not v.meaning] == []


def test_strict_types_cover_core_and_conformance() -> None:
    """`conformance` must join the checked packages when its folder arrives."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert checked["strict"] is True
    assert set(checked["packages"]) == {name for name in ("core", "conformance") if (ROOT / name).is_dir()}


@pytest.mark.parametrize(
    "line",
    ["# on a GPU", "cuda_graph = 1", "class CudaGraph:", "many TPUs", "HPUGraph", "x.to('cuda:0')", "rocm6"],
)
def test_the_vendor_check_finds_a_planted_word(line: str) -> None:
    assert vendor_words(f"import os\n{line}\n")[0].startswith("2: ")


@pytest.mark.parametrize(
    "line", ["a chip's relationship", "intelligence", "xlabel", "ship it", "scanned", "amdahl"]
)
def test_the_vendor_check_passes_words_that_only_contain_one(line: str) -> None:
    assert vendor_words(line) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nx = os.environ['A']",
        "import os as o\nx = o.getenv('A')",
        "import sys\nfrom os import environ as e",
        "import os\nos.putenv('A', 'b')",
    ],
)
def test_the_environment_check_finds_a_planted_use(source: str) -> None:
    assert environment_uses(source) == [2]


def test_the_function_check_counts_decorators_methods_and_inner_functions() -> None:
    source = "class A:\n  @property\n  def f(self):\n    def g():\n      pass\n    return g\n"
    assert sorted(functions(source)) == [(2, 4, "g"), (5, 2, "f")]


if __name__ == "__main__":
    print(report())
