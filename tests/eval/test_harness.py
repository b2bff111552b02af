"""lm-evaluation-harness runs a task against the server; its log-likelihoods are transformers'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.tokenizer import load_tokenizer

pytestmark = [pytest.mark.sample, pytest.mark.slow]

TASKS = Path(__file__).parent / "tasks"
BOUND = 1e-3
COMMAND = [sys.executable, "-c", "from core.cli import main; main()"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    arguments = ["serve", "sample", "--backend", "cpu", "--dtype", "float32", "--port", "0"]
    arguments += ["--max-model-len", "512", "--served-model-name", "sample"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        serving = next((line for line in lines if line.startswith("serving ")), None)
        assert serving is not None, f"the server ended with status {process.wait()}"
        yield serving.split()[-1]
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def tokenizer_folder(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer as the harness takes one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer: Any = load_tokenizer(sample_model)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference_log_likelihood(path: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Of each (context, continuation), by transformers in float32 with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    found = []
    for context, continuation in pairs:
        ids = context + continuation
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        rows = range(len(context) - 1, len(ids) - 1)
        found.append(sum(float(logits[row, ids[row + 1]]) for row in rows))
    return found


def test_log_likelihoods_of_the_harness_are_those_of_transformers(
    url: str, sample_model: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "sample",
            "base_url": f"{url}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tokenizer_folder),
            "max_length": 512,
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=["core_choices"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    tokenizer = load_tokenizer(sample_model)
    pairs, ours = [], []
    for sample in done["samples"]["core_choices"]:
        for (context, continuation), response in zip(
            (r.values() if isinstance(r, dict) else r for r in sample["arguments"]),
            sample["filtered_resps"],
            strict=True,
        ):
            start = tokenizer.encode(context, add_special_tokens=False)
            pairs.append(
                (start, tokenizer.encode(context + continuation, add_special_tokens=False)[len(start) :])
            )
            ours.append(float(response[0]))
    assert len(ours) == 48
    theirs = reference_log_likelihood(sample_model, pairs)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert largest < BOUND
    assert done["results"]["core_choices"]["acc,none"] > 0.7
