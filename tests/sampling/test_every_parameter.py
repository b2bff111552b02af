"""No parameter is ignored: each field of SamplingParams has an entry that shows what it does to a request.

An entry is shown with the field as asked and must not show without it, so it cannot pass by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from core import LLM, SamplingParams
from core.engine.outputs import CompletionOutput, RequestOutput
from tests.models.conftest import tiny_folder
from tests.models.tiny import VOCAB
from tests.tokenizer.small import EOS, byte_level, write_folder

__all__ = ["tiny_folder"]

PROMPT = [5, 6, 7, 8]
EOS_ID = 1
BASE = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
GREEDY = replace(BASE, temperature=0)
FORCED = dict.fromkeys((40, 41, 42), 1000.0)
"""A bias after which only these ids are drawn."""

Run = Callable[[SamplingParams], RequestOutput]
Shown = Callable[[Run, SamplingParams], bool]


@dataclass(frozen=True)
class Entry:
    """What shows that a field is heeded.

    Attributes:
        params: the parameters, or what makes them of what the model says.
        shows: whether a request with these parameters does what the field says.
    """

    params: SamplingParams | Callable[[Run], SamplingParams]
    shows: Shown


def first(run: Run, params: SamplingParams) -> CompletionOutput:
    return run(params).outputs[0]


def ids(run: Run, params: SamplingParams) -> tuple[int, ...]:
    return first(run, params).token_ids


def is_greedy(run: Run, params: SamplingParams) -> bool:
    """Whether the draws are the likeliest ids."""
    return ids(run, params) == ids(run, GREEDY)


def repeats(run: Run, params: SamplingParams) -> bool:
    """Whether a second request gets the same."""
    return ids(run, params) == ids(run, params)


def hot(**changes: Any) -> SamplingParams:
    return replace(BASE, temperature=30.0, **changes)


def biased(**changes: Any) -> SamplingParams:
    return replace(GREEDY, logit_bias=FORCED, **changes)


def with_stop(**changes: Any) -> Callable[[Run], SamplingParams]:
    """A stop text that is in the middle of what comes."""
    return lambda run: biased(stop=(first(run, biased()).text[2:4],), **changes)


def with_ban(run: Run) -> SamplingParams:
    """A ban of the first two ids that come."""
    return biased(bad_words_ids=(ids(run, biased())[:2],))


def with_bad_word(run: Run) -> SamplingParams:
    """A ban of the first character that comes."""
    return biased(bad_words=(first(run, biased()).text[0],))


def most_frequent(tokens: tuple[int, ...]) -> int:
    """How often the most frequent id is there."""
    return max(map(tokens.count, tokens))


MANY = dict.fromkeys(range(40, 70), 100.0)
"""A bias towards so many ids that none need come twice."""

LEADING = {40: 1000.0, 41: 985.0, 42: 985.0}
"""A bias by which 40 leads so far that only a penalty that grows with each of its 12 tokens ends that."""


def ends_the_lead(run: Run, params: SamplingParams) -> bool:
    return set(ids(run, replace(params, logit_bias=LEADING))) != {40}


def adds_variety(run: Run, params: SamplingParams) -> bool:
    """Whether more different ids come than by the bias alone."""
    return len(set(ids(run, params))) > len(set(ids(run, replace(GREEDY, logit_bias=MANY))))


ENTRIES: dict[str, Entry] = {
    "n": Entry(replace(BASE, n=4), lambda run, p: len({o.token_ids for o in run(p).outputs}) == 4),
    "temperature": Entry(GREEDY, lambda run, p: ids(run, p) == ids(run, replace(p, seed=2))),
    "top_k": Entry(hot(top_k=1), is_greedy),
    "top_p": Entry(hot(top_p=1e-6), is_greedy),
    "min_p": Entry(hot(min_p=1.0), is_greedy),
    "seed": Entry(hot(seed=5), repeats),
    "max_tokens": Entry(replace(BASE, max_tokens=5), lambda run, p: len(ids(run, p)) == 5),
    "stop": Entry(with_stop(), lambda run, p: first(run, p).finish_reason == "stop"),
    "stop_token_ids": Entry(
        biased(stop_token_ids=(40, 41, 42)), lambda run, p: first(run, p).stop_reason in (40, 41, 42)
    ),
    "ignore_eos": Entry(
        replace(GREEDY, logit_bias={EOS_ID: 1000.0}), lambda run, p: ids(run, p) == (EOS_ID,) * 12
    ),
    "min_tokens": Entry(
        replace(GREEDY, logit_bias={EOS_ID: 1000.0}, ignore_eos=False, min_tokens=7),
        lambda run, p: ids(run, p).index(EOS_ID) == 7,
    ),
    "presence_penalty": Entry(
        replace(GREEDY, logit_bias=MANY, presence_penalty=2.0),
        lambda run, p: adds_variety(run, p) and not ends_the_lead(run, p),
    ),
    "frequency_penalty": Entry(replace(GREEDY, frequency_penalty=2.0), ends_the_lead),
    "repetition_penalty": Entry(
        replace(GREEDY, logit_bias=MANY, repetition_penalty=100.0),
        lambda run, p: most_frequent(ids(run, p)) == 1,
    ),
    "bad_words": Entry(with_bad_word, lambda run, p: first(run, biased()).text[0] not in first(run, p).text),
    "bad_words_ids": Entry(with_ban, lambda run, p: ids(run, biased())[:2] not in set(pairwise(ids(run, p)))),
    "logit_bias": Entry(biased(), lambda run, p: set(ids(run, p)) <= set(FORCED)),
    "allowed_token_ids": Entry(hot(allowed_token_ids=(9, 70)), lambda run, p: set(ids(run, p)) == {9, 70}),
    "logprobs": Entry(
        replace(BASE, logprobs=3),
        lambda run, p: [len(x) >= 3 for x in first(run, p).logprobs or ()] == [True] * 12,
    ),
    "prompt_logprobs": Entry(
        replace(BASE, prompt_logprobs=2), lambda run, p: len(run(p).prompt_logprobs or ()) == len(PROMPT)
    ),
    "include_stop_str_in_output": Entry(
        with_stop(include_stop_str_in_output=True), lambda run, p: first(run, p).text.endswith(p.stop)
    ),
    "detokenize": Entry(biased(detokenize=False), lambda run, p: first(run, p).text == ""),
    "skip_special_tokens": Entry(
        replace(GREEDY, logit_bias={EOS_ID: 1000.0}, skip_special_tokens=False),
        lambda run, p: EOS in first(run, p).text,
    ),
}
"""By field. A new field wants an entry here."""


@pytest.fixture(scope="module", params=["cpu_reference", "cpu"])
def llm(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LLM]:
    """A tiny model that has an end of sequence."""
    path = tmp_path_factory.mktemp("every") / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": EOS_ID}))
    write_folder(path, byte_level(VOCAB))
    with LLM(
        path, backend=request.param, dtype="float32", max_model_len=64, num_blocks=64, show_progress=False
    ) as found:
        yield found


def test_every_field_has_an_entry() -> None:
    assert set(ENTRIES) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_field_is_heeded_and_its_entry_notices_when_it_is_not(name: str, llm: LLM) -> None:
    def run(params: SamplingParams) -> RequestOutput:
        return llm.generate([PROMPT], params)[0]

    entry = ENTRIES[name]
    params = entry.params if isinstance(entry.params, SamplingParams) else entry.params(run)
    (default,) = (f.default for f in fields(SamplingParams) if f.name == name)
    assert default is not MISSING and getattr(params, name) != default
    assert entry.shows(run, params)
    assert not entry.shows(run, replace(params, **{name: default})), "the entry shows nothing"


def test_four_choices_are_four_continuations_and_the_same_again(llm: LLM) -> None:
    params = replace(BASE, n=4, max_tokens=20)
    outputs = llm.generate([PROMPT], params)[0].outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({o.token_ids for o in outputs}) == 4 and {len(o.token_ids) for o in outputs} == {20}
    again = llm.generate([PROMPT, PROMPT], [params, replace(params, n=2)])
    assert [o.token_ids for o in again[0].outputs] == [o.token_ids for o in outputs]
    assert [o.token_ids for o in again[1].outputs] == [o.token_ids for o in outputs[:2]]
