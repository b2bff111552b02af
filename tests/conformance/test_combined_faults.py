"""Faults that show only where two things meet, or at one size: checks of their own family find them."""

from __future__ import annotations

import re

import pytest

from conformance.catalogue import catalogue
from conformance.subject import Subject, Target
from conformance.worker import run_check
from conformance.zoo.clone import edited, load, sources
from core.plugins import Plugins

Edit = tuple[str, str, str]

_DRAW = "sampled = self._sampler(logits, sampling)"
_BLOCK = "block = fields.block_table[row, positions // fields.block_size]"
_WINDOW = "first = max(first, position - spec.window + 1)"
_SEEN = "seen = visible(position, row.length, spec)"
_END = "return np.arange(first, min(end, length))"
_PRODUCT = "    y = np.empty((len(rows), len(w)))\n"
_LOOKUP = "        out = np.zeros((len(ids), w.shape[1]))\n"
_FUSED = "attention.attend(q, k, v, cache, step, spec, sinks)\n        return self._round(out), cache"


def sampler(changed: str) -> list[Edit]:
    """A sampler that is given changed parameters."""
    return [
        ("compiler", _DRAW, f"sampling = replace(sampling, {changed})\n        {_DRAW}"),
        ("compiler", "import numpy as np\n", "from dataclasses import replace\n\nimport numpy as np\n"),
    ]


def fused(changed: str) -> list[Edit]:
    """A fused attention whose spec is changed."""
    return [
        ("ops", _FUSED, _FUSED.replace("spec, sinks", f"replace(spec, {changed}), sinks")),
        ("ops", "import numpy as np\n", "from dataclasses import replace\n\nimport numpy as np\n"),
    ]


FAULTS: dict[str, tuple[str, list[Edit]]] = {
    "a temperature below 1 is taken as 1": (
        "L2/sampling/",
        sampler("temperature=np.where(sampling.temperature > 0, np.maximum(sampling.temperature, 1), 0)"),
    ),
    "a small top-p is raised": (
        "L2/sampling/",
        sampler("top_p=np.maximum(sampling.top_p, np.float32(0.25))"),
    ),
    "penalties are left out beside a mask": (
        "L2/sampling/",
        sampler("history=None if sampling.bitmask is not None else sampling.history"),
    ),
    "penalties are left out beside top-k": (
        "L2/sampling/",
        sampler("history=None if (sampling.top_k > 0).any() else sampling.history"),
    ),
    "another scale for wide heads": (
        "L2/attend/",
        [
            (
                "attention",
                "spec.scale * (keys[kv] @ queries[n])",
                "(spec.scale if spec.head_size < 80 else 0.09) * (keys[kv] @ queries[n])",
            )
        ],
    ),
    "a window of whole tiles is one short": (
        "L2/attend/",
        [("attention", _WINDOW, _WINDOW[:-1] + " + (spec.window % 16 == 0))")],
    ),
    "no sink beside a soft cap": (
        "L2/attend/",
        [
            (
                "attention",
                "None if sinks is None else",
                "None if sinks is None or spec.soft_cap is not None else",
            )
        ],
    ),
    "a long verification sees its future": (
        "L2/attend/",
        [
            (
                "attention",
                _SEEN,
                f"{_SEEN}\n            if 6 <= len(row.tokens) <= 8 and step.query_kind[row.number] == 1:"
                "\n                seen = np.arange(row.length)",
            )
        ],
    ),
    "wide blocks are written one place off": (
        "L2/attend/",
        [
            (
                "allocator",
                _BLOCK,
                f"{_BLOCK}\n        if fields.block_size >= 32:\n"
                "            positions = np.maximum(positions - 1, 0)",
            )
        ],
    ),
    "fused attention forgets chunks": ("L2/norm_rope_attend/", fused("chunk=None")),
    "fused attention is always causal": ("L2/norm_rope_attend/", fused("causal=True")),
    "fused attention forgets the scale by position": ("L2/norm_rope_attend/", fused("q_scale=None")),
    "one token's NaN spoils all tokens that go to experts": (
        "L2/experts/",
        [
            (
                "experts",
                "    out = np.zeros(x.shape)\n",
                "    out = np.full(x.shape, 0.0 if np.isfinite(x).all() else np.nan)\n",
            )
        ],
    ),
    "one sequence's NaN spoils all that are scanned": (
        "L2/state_scan/",
        [("state", "beta[n] * (wide(v[t, n])", "beta[n] * (wide(v[t, n]) + 0 * np.sum(v)")],
    ),
    "a later row begins with what its slot held": (
        "L2/state_scan/",
        [
            (
                "state",
                "np.zeros_like(part[0]) if slot < 0 else",
                "np.nan_to_num(part[int(fields.write[row.number])]) if slot < 0 and row.number > 2"
                " else np.zeros_like(part[0]) if slot < 0 else",
            )
        ],
    ),
    "only the first row's state is stored": (
        "L2/checkpoints/offset-",
        [
            (
                "state",
                "        offset = int(fields.checkpoint_offset[row.number])\n        for i, t",
                "        offset = int(fields.checkpoint_offset[row.number]) if row.number == 0 else 0\n"
                "        for i, t",
            )
        ],
    ),
    "keys beyond 512 are not read": (
        "L2/attend/keys-",
        [("attention", _END, f"{_END}[:512]")],
    ),
    "a step's table has nine rows": (
        "L2/attend/rows-",
        [("allocator", "fields.block_table[row,", "fields.block_table[min(row, 8),")],
    ),
    "a scan ends after 256 tokens": (
        "L2/state_scan/",
        [
            (
                "state",
                "            decay = np.exp(-rate",
                "            if i >= 256:\n                continue\n            decay = np.exp(-rate",
            )
        ],
    ),
    "a convolution ends after 256 tokens": (
        "L2/short_conv/",
        [
            (
                "state",
                "y = np.zeros(spec.channels) if bias",
                "if i == 256:\n                break\n            y = np.zeros(spec.channels) if bias",
            )
        ],
    ),
    "rows of a weight beyond 4096 are 0": (
        "L2/linear/",
        [("arithmetic", _PRODUCT, f"{_PRODUCT}    w = np.where(np.arange(len(w))[:, None] < 4096, w, 0)\n")],
    ),
    "columns of a weight beyond 2048 are 0": (
        "L2/linear/",
        [("arithmetic", _PRODUCT, f"{_PRODUCT}    w = np.where(np.arange(w.shape[1]) < 2048, w, 0)\n")],
    ),
    "a norm takes the mean of 2048 elements": (
        "L2/norm/",
        [
            (
                "arithmetic",
                "np.array([row @ row for row in rows])",
                "np.array([row[:2048] @ row[:2048] for row in rows])",
            )
        ],
    ),
    "logits of a large vocabulary are cut to 8 bits": (
        "L2/linear/",
        [
            (
                "ops",
                "return y if wide else self._round(y)",
                "if wide and y.shape[-1] > 1000:\n"
                "            y = (y.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)\n"
                "        return y if wide else self._round(y)",
            )
        ],
    ),
    "ids have 16 bits": (
        "L2/embed/",
        [("ops", _LOOKUP, f"{_LOOKUP}        ids = np.asarray(ids).astype(np.int16)\n")],
    ),
    "rows that are taken have 16 bits": (
        "L2/take/",
        [("ops", "return x[rows]", "return x[np.asarray(rows).astype(np.uint16)]")],
    ),
    "64 experts": (
        "L2/experts/",
        [
            (
                "experts",
                "slot = int(chosen if slot_of_expert",
                "chosen %= 64\n            slot = int(chosen if slot_of_expert",
            )
        ],
    ),
    "a program made ready gives no state": (
        "L1/memory/warmed",
        [
            (
                "compiler",
                "        return supersede(state)\n\n    def run(",
                "        supersede(state)\n\n    def run(",
            )
        ],
    ),
    "only the first blocks of a long list are copied": (
        "L1/blocks/whole-pool-",
        [("allocator", "read, write = _ids(src), _ids(dst)", "read, write = _ids(src)[:32], _ids(dst)[:32]")],
    ),
    "only the first blocks of a long list are zeroed": (
        "L1/blocks/whole-pool-",
        [
            (
                "allocator",
                "                cache.touch(_ids(blocks))",
                "                blocks = blocks[:32]\n                cache.touch(_ids(blocks))",
            )
        ],
    ),
    "each allocation keeps some memory for ever": (
        "L1/blocks/cycles-",
        [
            (
                "allocator",
                "        groups = [plan.groups[g] for g in plan.group_of]\n",
                "        groups = [plan.groups[g] for g in plan.group_of]\n"
                "        _KEPT.append(np.ones(1 << 15))\n",
            ),
            ("allocator", "def supersede(", "_KEPT = []\n\n\ndef supersede("),
        ],
    ),
    "an expert takes so many tokens and no more": (
        "L2/experts/",
        [
            ("experts", "    out = np.zeros(x.shape)\n", "    out, load = np.zeros(x.shape), {}\n"),
            (
                "experts",
                "            if slot < 0:  #",
                "            load[int(chosen)] = load.get(int(chosen), 0) + 1\n"
                "            if load[int(chosen)] > 2 * x.shape[0] * ids.shape[1] // spec.num_experts:\n"
                "                continue\n            if slot < 0:  #",
            ),
        ],
    ),
}


FAR: dict[str, tuple[str, list[Edit]]] = {
    "a block's place overflows 32 bits": (
        "L2/addressing/past-",
        [("allocator", _BLOCK, f"{_BLOCK} % (2**31 // (fields.block_size * 128))")],
    ),
    "a copied block's place overflows 32 bits": (
        "L1/blocks/far",
        [
            (
                "allocator",
                "read, write = _ids(src), _ids(dst)",
                "read, write = _ids(src) % (2**31 // 128), _ids(dst)",
            )
        ],
    ),
}
"""Found with --full alone, and with room for 17 GB of addresses."""


@pytest.mark.parametrize("name", [*FAULTS, *(pytest.param(n, marks=pytest.mark.slow) for n in FAR)])
def test_a_fault_is_found_by_its_own_family(name: str) -> None:
    family, edits = (FAULTS | FAR)[name]
    module = load(edited(sources(), edits), f"conformance_combined_{[*FAULTS, *FAR].index(name)}")
    target = Target("cpu_reference", "float32")
    subject = Subject(target, Plugins(disabled=frozenset()).register_backend(module, "cpu_reference"))
    checks = [
        check
        for check in catalogue(subject.spec, target, 2)
        if re.match(family, check.id) and "distribution" not in check.id and (check.is_quick or name in FAR)
    ]
    results = (run_check(check, subject, 2) for check in checks if check.supported(subject.spec))
    found = next((result for result in results if result.status != "pass"), None)
    assert found is not None, f"{len(checks)} checks of {family} found nothing"
    assert found.status == "fail" and "unexpected" not in found.message, found.message


@pytest.mark.parametrize(
    "pattern",
    [
        "L0/",
        "L1/blocks/(every-block|export-is-a-copy|copies|zeros|whole-pool)-",
        "L1/memory/(sampled-slots|padding-writes-nothing)",
        "L2/isolation/",
        "L2/addressing/[a-z]+-",
        "L2/sampling/(neighbours|not-a-number|after-not-a-number)",
        "L2/.*-poison-",
        "L2/.*-isolated$",
        "L5/engine/(identity|aborted|prefix-hit)-",
    ],
)
def test_what_keeps_requests_apart_is_never_waived(pattern: str) -> None:
    target = Target("cpu_reference", "float32")
    found = [c for c in catalogue(Subject.of(target).spec, target, 2) if re.match(pattern, c.id)]
    assert found and not [c.id for c in found if c.is_waivable]


@pytest.mark.parametrize(("backend", "status"), [("cpu_reference", "pass"), ("cpu", "not supported")])
def test_an_inherited_composite_is_no_pass(backend: str, status: str) -> None:
    subject = Subject.of(Target(backend, "float32"))
    checks = [
        c for c in catalogue(subject.spec, subject.target, 2) if c.id.endswith("norm_linear-whole-composite")
    ]
    assert [run_check(c, subject, 2).status for c in checks] == [status]
