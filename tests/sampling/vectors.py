"""Known answers of the sampler: draws from stated logits, which every sampler repeats.

As a script, `python -m tests.sampling.vectors --write` makes vectors.json anew and `--check` compares it. The
file serves implementations in other languages too, so here is all that a draw needs:

    logits: x[0] = start, x[i + 1] = (1664525 x[i] + 1013904223) mod 2^32; the logit of id i is
        (floor(x[i + 1] / 2^16) mod levels - floor(levels / 2)) / 16, exact in float32. Few levels make ties.
    draws: [seed, position, choice, token] each. Prompts have two tokens; id 1 ends a sequence.

Only draws are written that other arithmetic gives too: moving every logit by up to `margin` changes no token.
Of sets with ties at a cut (`ties`), where ids are told apart by their order alone, the margin is that of the
noisy logits only, and a sampler must have the logits as they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.sampling.params import SamplingParams
from core.sampling.reference import allowed, gumbel, sample
from tests.sampling.drawing import Draw, batch_of
from tests.sampling.margin import NOISE, is_decided

Float32 = npt.NDArray[np.float32]

PATH = Path(__file__).with_name("vectors.json")
MARGIN = 1e-4
DRAWS = 12
"""Of each set."""


@dataclass(frozen=True)
class Set:
    """Logits, parameters and draws from them.

    Attributes:
        params: fields of SamplingParams that are not the default.
        draws: (seed, position, choice, token).
    """

    vocab: int
    start: int
    levels: int
    params: dict[str, Any] = field(default_factory=dict)
    ties: bool = False
    draws: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def logits(self) -> Float32:
        """float32 [vocab], by the rule above."""
        x, found = self.start, []
        for _ in range(self.vocab):
            x = (1664525 * x + 1013904223) % 2**32
            found.append(((x >> 16) % self.levels - self.levels // 2) / 16)
        return np.array(found, np.float32)

    @property
    def sampling_params(self) -> SamplingParams:
        """The parameters as the engine takes them: JSON has text for ids, and no infinity but as text."""
        fields = dict(self.params)
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(i): float(v) for i, v in fields["logit_bias"].items()}
        return SamplingParams(**fields)


SETS = (
    Set(64, 1, 256),
    Set(1031, 2, 256),
    Set(7, 3, 64),
    Set(64, 4, 256, {"temperature": 0.0}),
    Set(1031, 5, 16, {"temperature": 0.0}, ties=True),
    Set(64, 6, 256, {"temperature": 0.3}),
    Set(1031, 7, 256, {"temperature": 25.0}),
    Set(64, 8, 256, {"temperature": 1e-6}),
    Set(1031, 9, 256, {"temperature": 1e6}),
    Set(64, 10, 64, {"top_k": 5}),
    Set(1031, 11, 16, {"top_k": 100, "temperature": 2.0}, ties=True),
    Set(64, 12, 1, {"top_k": 3}, ties=True),
    Set(1031, 13, 64, {"top_p": 0.7}),
    Set(64, 14, 1, {"top_p": 0.5}, ties=True),
    Set(64, 15, 1, {"top_p": 0.265625}, ties=True),
    Set(1031, 16, 64, {"min_p": 0.3}),
    Set(64, 17, 4, {"min_p": 1.0}, ties=True),
    Set(1031, 18, 128, {"temperature": 1.3, "top_k": 200, "top_p": 0.7}),
    Set(1031, 22, 128, {"temperature": 3.0, "min_p": 0.5}),
    Set(64, 19, 32, {"allowed_token_ids": [0, 1, 31, 32, 63], "top_k": 3}),
    Set(64, 20, 32, {"logit_bias": {"9": 2.3, "0": "-inf", "63": 1.2}, "top_p": 0.6}),
    Set(64, 21, 64, {"min_tokens": 1 << 20, "max_tokens": None, "stop_token_ids": [12, 32, 42]}),
)
"""What is drawn, without the draws."""


def keys(number: int) -> list[tuple[int, int, int]]:
    """Candidates of a set's (seed, position, choice): all words of the counter and the key are used."""
    word = 6364136223846793005
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, *((number * 997 + k) * word % 2**64 for k in range(60))]
    return [(s, 2 + (k * 7919 if k % 3 else 0), k % 5 if k % 2 else 0) for k, s in enumerate(seeds)]


def is_certain(one: Set, logits: Float32, key: tuple[int, int, int]) -> bool:
    """Whether moving the logits that may be drawn by MARGIN leaves the token as it is."""
    params, (seed, position, choice) = one.sampling_params, key
    if not one.ties:
        return is_decided(logits.astype(np.float64), params, seed, position, MARGIN, choice)
    if params.temperature == 0:
        return True
    scaled = logits / np.float32(params.temperature)
    noisy = scaled + gumbel(seed, position, choice, one.vocab)
    best = np.sort(noisy[allowed(scaled, params.top_k, params.top_p, params.min_p)])[-2:]
    return bool(best[-1] - best[0] > 2 * MARGIN / params.temperature + NOISE) or len(best) == 1


def permitted(one: Set) -> Float32:
    """The logits after biases and masks."""
    params, found = one.sampling_params, one.logits
    for i, value in (params.logit_bias or {}).items():
        found[i] += np.float32(value)
    if params.allowed_token_ids is not None:
        found[np.isin(np.arange(one.vocab), params.allowed_token_ids, invert=True)] = -np.inf
    if params.min_tokens:
        found[[1, *params.stop_token_ids]] = -np.inf
    return found


def drawn(number: int, one: Set) -> Set:
    """The set with the reference's draws."""
    logits = permitted(one)
    certain = [key for key in keys(number) if is_certain(one, logits, key)][:DRAWS]
    if len(certain) < DRAWS:
        raise ValueError(f"set {number} has only {len(certain)} draws that are certain; choose another start")
    batch = batch_of([Draw(one.sampling_params, *key) for key in certain], one.vocab)
    tokens = sample(np.tile(one.logits, (DRAWS, 1)), batch).tokens.tolist()
    draws = tuple((*key, token) for key, token in zip(certain, tokens, strict=True))
    return Set(one.vocab, one.start, one.levels, one.params, one.ties, draws)


def text() -> str:
    """What vectors.json holds: one line a set."""
    lines = [json.dumps(vars(drawn(i, one)), separators=(",", ":")) for i, one in enumerate(SETS)]
    return f'{{"margin":{MARGIN},"sets":[\n' + ",\n".join(lines) + "\n]}\n"


def read() -> list[Set]:
    """The committed sets."""
    sets = json.loads(PATH.read_text())["sets"]
    return [Set(**{**one, "draws": tuple(map(tuple, one["draws"]))}) for one in sets]


def main(arguments: list[str]) -> int:
    """Write or check."""
    if arguments == ["--write"]:
        PATH.write_text(text())
        return 0
    if arguments == ["--check"]:
        return 0 if PATH.read_text() == text() else 1
    print("usage: python -m tests.sampling.vectors --write | --check", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
