"""lm-evaluation-harness scores a task through the server as transformers scores it by itself.

The harness is a command of its own, as users run it; it gets nothing from the network. The reference is
transformers in float32 with the same GGUF's weights and its own reading of the tokenizer, which the harness
uses too. So where texts are sent, the server's tokenizer must agree with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.sample, pytest.mark.slow]

TASKS = Path(__file__).parent / "tasks"
CORE = [sys.executable, "-c", "from core.cli import main; main()"]
BOUND = 1e-3
"""Largest difference of two log-likelihoods, each a sum over a continuation's tokens."""
MARGIN = 0.02
"""Where the reference's two largest logits are nearer than this, either may be called the greedy token."""
COUNT = 48


@dataclass(frozen=True)
class Scored:
    """One continuation: its log-likelihood, and whether it is the greedy one."""

    log_likelihood: float
    is_greedy: bool
    is_decided: bool = True


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    arguments = ["serve", "sample", "--backend", "cpu", "--dtype", "float32", "--port", "0"]
    arguments += ["--max-model-len", "512", "--served-model-name", "sample"]
    process = subprocess.Popen([*CORE, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = ""
        # The server keeps its output open, so reading stops at the line that is wanted.
        for line in process.stdout:
            if line.startswith("serving "):
                found = line.split()[-1]
                break
        assert found, f"the server ended with status {process.wait()}"
        yield found
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def tokenizer(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """What transformers makes of the GGUF's tokenizer, and the folder where the harness finds it."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    folder = tmp_path_factory.mktemp("tokenizer")
    found.save_pretrained(folder)
    return found, folder


@pytest.fixture(scope="module")
def reference(sample_model: Path, tokenizer: tuple[Any, Path]) -> list[Scored]:
    """Every choice of every question, in order, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        sample_model.parent, gguf_file=sample_model.name, dtype=torch.float32
    ).eval()
    found = []
    for line in (TASKS / "choices.jsonl").read_text().splitlines():
        doc = json.loads(line)
        start = len(tokenizer[0].encode(doc["question"]))
        for choice in doc["choices"]:
            ids = torch.tensor([tokenizer[0].encode(doc["question"] + choice)])
            with torch.inference_mode():
                logits = model(ids).logits[0, start - 1 : -1].double()
            wanted = ids[0, start:]
            top = logits.topk(2).values
            chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
            is_decided = bool((top[:, 0] - top[:, 1] >= MARGIN).all())
            found.append(Scored(float(chosen.sum()), bool((logits.argmax(-1) == wanted).all()), is_decided))
    return found


def evaluate(url: str, folder: Path, out: Path, sending: str, batch_size: int) -> tuple[list[Scored], float]:
    """Run the harness; the score of every choice in order, and the task's accuracy."""
    model = f"model=sample,base_url={url}/completions,tokenizer_backend=huggingface,tokenizer={folder}"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", f"{model},max_length=512,max_retries=1,timeout=60,{sending}"]
    command += ["--batch_size", str(batch_size), "--tasks", "core_choices", "--include_path", str(TASKS)]
    command += ["--output_path", str(out / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home")}
    done = subprocess.run(
        command, cwd=TASKS, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (out / "results").rglob("results_*.json")
    (samples,) = (out / "results").rglob("samples_core_choices_*.jsonl")
    docs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda doc: int(doc["doc_id"]))
    scores = [
        Scored(float(value), is_greedy == "True") for d in docs for value, is_greedy in d["filtered_resps"]
    ]
    return scores, float(json.loads(results.read_text())["results"]["core_choices"]["acc,none"])


@pytest.mark.parametrize(
    ("sending", "batch_size"),
    [
        ("tokenized_requests=True,num_concurrent=1", 1),
        ("tokenized_requests=False,num_concurrent=4", 8),
    ],
    ids=["ids one by one", "texts in concurrent batches"],
)
def test_log_likelihoods_of_the_harness_are_those_of_transformers(
    url: str,
    tokenizer: tuple[Any, Path],
    reference: list[Scored],
    tmp_path: Path,
    sending: str,
    batch_size: int,
) -> None:
    scores, accuracy = evaluate(url, tokenizer[1], tmp_path, sending, batch_size)
    assert len(scores) == len(reference) == COUNT
    differences = [abs(s.log_likelihood - r.log_likelihood) for s, r in zip(scores, reference, strict=True)]
    print(f"largest difference of {COUNT} log-likelihoods: {max(differences):.2e}; accuracy {accuracy}")
    assert max(differences) < BOUND
    decided = [(s.is_greedy, r.is_greedy) for s, r in zip(scores, reference, strict=True) if r.is_decided]
    assert len(decided) >= 0.9 * COUNT and {r for _, r in decided} == {True, False}
    assert all(ours == theirs for ours, theirs in decided)

    docs = [json.loads(line) for line in (TASKS / "choices.jsonl").read_text().splitlines()]
    rows = [reference[i : i + 3] for i in range(0, COUNT, 3)]
    best = [max(range(3), key=lambda i, row=row: row[i].log_likelihood) for row in rows]  # type: ignore[misc]
    right = sum(b == doc["answer"] for b, doc in zip(best, docs, strict=True))
    assert accuracy == pytest.approx(right / len(docs))
