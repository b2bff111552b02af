"""A legal declaration, however odd, is never a reason to fail: the checks follow what is declared."""

from __future__ import annotations

import re

import numpy as np
import pytest

from conformance.catalogue import catalogue, lacking
from conformance.drawing import _split
from conformance.families import sized
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import edited, load, sources
from core.contract.errors import ConfigError
from core.plugins import Plugins

SIZES = ("plugin", "(16, 1, 2, 4, 8, 32, 64, 128, 256)")
ENGINE = "L5/engine/(uneven|prefix-hit|preempted|batched)-llama"
CASES = {
    "head size 128 alone": ([("plugin", "window=True,", "window=True,\n        head_sizes=(128,),")], ENGINE),
    "block size 48 alone": ([(*SIZES, "(48,)")], "L2/attend/attend-grouped.*rule-a|L4/models/llama"),
    "block size 256 alone": ([(*SIZES, "(256,)")], ENGINE),
    "block size 1 alone": ([(*SIZES, "(1,)")], ENGINE),
    "one request at once": (
        [
            ("plugin", "state_kinds=", "batch=BatchRules(max_requests=1),\n    state_kinds="),
            ("plugin", "import AttentionRules,", "import AttentionRules, BatchRules,"),
        ],
        ENGINE,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_checks_follow_what_is_declared(name: str) -> None:
    edits, pattern = CASES[name]
    plugins = Plugins(disabled=frozenset())
    module = load(edited(sources(), edits), f"conformance_declares_{list(CASES).index(name)}")
    target = Target("cpu_reference", "float32")
    subject = Subject(target, plugins.register_backend(module, "cpu_reference"))
    checks = [
        check
        for check in catalogue(subject.spec, target, 3)
        if re.search(pattern, check.id) and check.supported(subject.spec)
    ]
    assert len(checks) >= 3
    for check in checks:
        result = run_check(check, subject, 3)
        assert result.status == "pass", (check.id, result.message)


def test_a_family_keeps_its_own_head_size_where_the_backend_has_it() -> None:
    assert sized("llama", ()) == sized("llama", (16, 64)) == "llama"
    assert sized("llama", (128, 64)) == "llama@64"
    assert sized("qwen3", (32,)) == "qwen3"
    assert sized("deepseek_v3", (64,)) == "deepseek_v3", "latent attention has sizes of its own"


def test_samplers_are_checked_where_there_is_no_float32() -> None:
    """Logits that float32 has come exactly out of products of a narrow dtype."""
    texts = sources("cpu")
    (declared,) = re.findall(r"dtypes=\([^)]*\)", texts["plugin"])
    narrow = edited(texts, [("plugin", declared, 'dtypes=("bfloat16",)')])
    module = load(narrow, "conformance_narrow", "cpu")
    plugins = Plugins(disabled=frozenset())
    target = Target("cpu", "bfloat16")
    subject = Subject(target, plugins.register_backend(module, "cpu"))
    checks = [c for c in catalogue(subject.spec, target, 3) if c.id.startswith("L2/sampling/")]
    run = [c for c in checks if c.is_quick and not lacking(c, subject.spec)]
    assert len(run) > 60
    for check in run:
        result = run_check(check, subject, 3)
        assert result.status == "pass", (check.id, result.message)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_float32_are_exact_products_of_a_narrow_dtype(dtype: str) -> None:
    logits = (3 * np.random.default_rng(0).normal(size=(5, 300))).astype(np.float32)
    logits[0, :4] = (-2000.0, 1e-3, 0.0, 1003.7)
    parts = _split(logits, dtype)
    for part in parts.values():
        assert (part.astype(np.dtype(dtype)).astype(np.float32) == part).all()
    rows, columns = parts["rows"], parts["columns"]
    for order in (slice(None), slice(None, None, -1)):
        terms = rows[:, None, order] * columns[None, :, order]
        assert (np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1] == logits).all()
    with pytest.raises(ConfigError, match="no exact form"):
        _split(np.full((1, 1), np.nan, np.float32), dtype)
