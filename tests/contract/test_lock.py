"""The contract can't change unseen: lock and generated pages are what the source says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from core.contract import CONTRACT
from core.contract.hookspecs import OPTIONAL_HOOKS, REQUIRED_HOOKS
from core.contract.ops import FUSED_OPS, OPS

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "contract.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path, tool: ModuleType) -> Path:
    """A tree with the contract and its generated files, up to date."""
    shutil.copytree(ROOT / "core" / "contract", tmp_path / "core" / "contract")
    (tmp_path / "docs").mkdir()
    for name, text in tool.generate(tmp_path).items():
        (tmp_path / name).write_text(text)
    assert tool.problems(tmp_path) == []
    return tmp_path


def edit(root: Path, module: str, old: str, new: str) -> None:
    path = root / "core" / "contract" / module
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_generated_files_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("requests.py", "timeout_s: float = 60.0", "timeout_s: float = 30.0"),
        ("types.py", "    layout: str\n", "    layout: str\n    stride: int = 0\n"),
        ("types.py", 'needs("sampler_history")', 'needs("sampler")'),
        ("spec.py", "    soft_cap: bool = False\n", ""),
        ("ops.py", '@_op("plain", "D")', '@_op("plain", "D", roundings=2)'),
        ("ops.py", "first: int = 0", "first: int"),
        ("interfaces.py", "def barrier(self)", "def wait_for_all(self)"),
        ("hookspecs.py", "request: SamplerRequest", "request: OpsRequest"),
        ("errors.py", "class WeightError(CoreError)", "class WeightError(ConfigError)"),
        ("derive.py", "size: int | None = None", "size: int"),
    ],
)
def test_a_change_of_the_contract_fails_until_its_version_is_raised(
    copy: Path, tool: ModuleType, module: str, old: str, new: str
) -> None:
    edit(copy, module, old, new)
    lock = [p for p in tool.problems(copy) if p.startswith("contract.lock")]
    assert len(lock) == 1 and "its version did not: raise CONTRACT" in lock[0]


def test_a_raised_version_only_asks_for_the_files_to_be_written(copy: Path, tool: ModuleType) -> None:
    major, minor = CONTRACT
    edit(copy, "__init__.py", f"= ({major}, {minor})", f"= ({major}, {minor + 1})")
    edit(copy, "requests.py", "timeout_s: float = 60.0", "timeout_s: float = 30.0")
    (problem,) = tool.problems(copy)
    assert "run `python tools/contract.py --write`" in problem and "raise CONTRACT" not in problem


def test_wording_is_not_locked_but_is_regenerated(copy: Path, tool: ModuleType) -> None:
    edit(copy, "hookspecs.py", "Find devices.", "Look for devices.")
    (problem,) = tool.problems(copy)
    assert problem.startswith("docs/hooks.md is out of date")


def test_private_names_are_not_locked(copy: Path, tool: ModuleType) -> None:
    edit(
        copy,
        "ops.py",
        "def _missing(table: Ops, name: str)",
        "def _missing(table: Ops, name: str, n: int = 0)",
    )
    assert tool.problems(copy) == []


def test_every_hook_and_every_op_has_its_heading(tool: ModuleType) -> None:
    folder = ROOT / "core" / "contract"
    hooks, ops = tool.hooks_text(folder), tool.ops_text(folder)
    for hook in REQUIRED_HOOKS + OPTIONAL_HOOKS:
        assert f"\n### {hook}\n" in hooks
        for section in ("When", "If absent", "Since"):
            assert f"- **{section}:**" in hooks.split(f"\n### {hook}\n")[1].split("\n### ")[0], (
                hook,
                section,
            )
    for name, op in OPS.items():
        assert f"\n## {name}\n\nA {op.kind} op." in ops
        assert f"| `{name}` | {op.kind} | {', '.join(op.reduces) or '-'} | {op.roundings} |" in ops
    assert ops.count("Its composite:") == len(FUSED_OPS)
