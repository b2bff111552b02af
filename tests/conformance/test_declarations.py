"""A legal declaration, however odd, is never a reason to fail: the checks follow what is declared."""

from __future__ import annotations

import re

import pytest

from conformance.catalogue import catalogue
from conformance.families import sized
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import edited, load, sources
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
