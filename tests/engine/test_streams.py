"""Several callers of one LLM: each gets its own events, and nothing is left behind."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import LLM, SamplingParams
from core.contract.errors import EngineDead, RequestError
from core.engine.async_llm import AsyncLLM
from core.engine.queueing import Queueing
from tests.models.tiny import VOCAB
from tests.tokenizer.small import byte_level, write_folder

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)


@pytest.fixture
def llm(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[LLM]:
    path = tmp_path / "tiny"
    shutil.copytree(tiny_folder("llama"), path)
    write_folder(path, byte_level(VOCAB))
    with LLM(path, backend="null", dtype="float32", max_model_len=64, show_progress=False) as found:
        yield found


def test_generating_while_a_stream_is_read_takes_nothing_from_it(llm: LLM) -> None:
    counts = []
    for output in llm.stream([[5, 6, 7]], PARAMS):
        counts.append(len(output.outputs[0].token_ids))
        assert llm.generate([[8, 9]], PARAMS)[0].finished
    assert counts[-1] == 6 and not llm.engine.has_work


def test_two_streams_may_be_read_in_turn(llm: LLM) -> None:
    first, second = llm.stream([[5, 6, 7]], PARAMS), llm.stream([[5, 6, 7]], PARAMS)
    ends = []
    for a in first:
        b = next(second, None)
        ends = [a, b or ends[1]]
    rest = list(second)
    last = rest[-1] if rest else ends[1]
    assert ends[0].outputs[0].token_ids == last.outputs[0].token_ids and last.finished


def test_a_stream_that_nobody_reads_queues_nothing_and_a_closed_one_is_ended(llm: LLM) -> None:
    llm.stream([[5, 6]], PARAMS)
    assert not llm.engine.has_work
    stream = llm.stream([[5, 6]], PARAMS)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.engine.metrics().finished.get("abort") == 1 and llm.engine.metrics().blocks_used == 0


def test_waiting_for_a_request_that_was_ended_elsewhere_is_no_endless_loop(llm: LLM) -> None:
    stream = llm.stream([[5, 6]], PARAMS)
    name = next(stream).request_id
    assert llm.engine.abort(name)
    assert [o.outputs[0].finish_reason for o in stream] == ["abort"]
    lost = llm.queue([[5, 6]], PARAMS)
    llm.engine.abort(lost[0].request_id)
    llm.engine.step()
    with pytest.raises(EngineDead, match="that the engine does not have"):
        list(llm.run(lost))


def test_ids_may_be_numpys(llm: LLM) -> None:
    ids = np.array([5, 6, 7])
    wanted = llm.generate([[5, 6, 7]], PARAMS)[0].outputs[0].token_ids
    assert llm.generate([ids], PARAMS)[0].outputs[0].token_ids == wanted  # type: ignore[list-item]
    assert llm.generate(ids, PARAMS)[0].outputs[0].token_ids == wanted  # type: ignore[arg-type]


def test_threads_may_share_a_model(llm: LLM) -> None:
    def ask(i: int) -> tuple[int, ...]:
        return llm.generate([[5 + i, 6]], PARAMS)[0].outputs[0].token_ids

    wanted = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(ask, range(8))) == wanted


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(5), "the prompt is 5; give a text"),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), "give SamplingParams"),
        (lambda llm: llm.generate(["a"], ["b"]), "give SamplingParams"),
        (lambda llm: llm.chat("hello"), "messages is a text"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_a_sentence(
    llm: LLM, call: Callable[[LLM], object], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        call(llm)


def test_nothing_but_the_program_writes_to_standard_output(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate([[5, 6]], PARAMS, use_tqdm=True)
    assert capsys.readouterr().out == ""


def test_how_requests_wait_may_be_said(llm: LLM) -> None:
    prompt = list(range(20, 60))
    late = llm.generate([prompt], PARAMS, timeout_s=0.0)[0]
    assert late.outputs[0].finish_reason == "deadline"
    unbegun = llm.generate([prompt], PARAMS, queue_timeout_s=0.0)[0]
    assert unbegun.outputs[0].finish_reason == "deadline"
    assert llm.generate([prompt], PARAMS, salt="a")[0].num_cached_tokens == 0
    assert llm.generate([prompt], PARAMS, salt="b")[0].num_cached_tokens == 0
    assert llm.generate([prompt], PARAMS, salt="a", priority=3)[0].num_cached_tokens > 0


def test_a_lower_priority_ends_first_under_that_policy(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_folder(Path(shutil.copytree(tiny_folder("llama"), tmp_path / "tiny")), byte_level(VOCAB))
    with LLM(
        path,
        backend="null",
        dtype="float32",
        max_model_len=64,
        max_requests=1,
        policy="priority",
        show_progress=False,
    ) as llm:
        prompts = [[5, 6], [7, 8], [9, 10]]
        streams = llm.queue(prompts, PARAMS, priority=[5, -1, 0])
        ends = [output.prompt_token_ids for output in llm.run(streams) if output.finished]
        assert ends == [(7, 8), (9, 10), (5, 6)]
        kept = llm.generate(prompts, PARAMS, priority=[5, -1, 0])
        assert [list(o.prompt_token_ids) for o in kept] == prompts, "results keep the order of the prompts"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"timeout_s": float("nan")}, "timeout_s is nan; it must be 0 or more seconds"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": -1.0}, r"timeout_s is -1\.0"),
        ({"queue_timeout_s": "soon"}, "queue_timeout_s is 'soon'"),
        ({"priority": 1.5}, r"priority is 1\.5; it must be a whole number"),
        ({"priority": [1, 2, 3]}, "3 priorities were given for 2 prompts"),
        ({"salt": 7}, "salt is 7; it must be a text"),
    ],
)
def test_wrong_words_on_how_to_wait_are_refused_and_nothing_is_queued(
    llm: LLM, given: dict[str, Any], words: str
) -> None:
    messages = [[{"role": "user", "content": "a"}]] * 2
    llm.tokenizer = replace(llm.tokenizer, chat_template="{{ messages[0]['content'] }}")  # type: ignore[type-var]
    for call in (
        lambda: llm.generate([[5, 6]] * 2, PARAMS, **given),
        lambda: list(llm.stream([[5, 6]] * 2, PARAMS, **given)),
        lambda: llm.chat(messages, PARAMS, **given),
    ):
        with pytest.raises(RequestError, match=words):
            call()
        assert not llm.engine.has_work


def test_every_way_to_ask_has_the_same_words_and_defaults_as_the_record() -> None:
    for call in (LLM.generate, LLM.chat, LLM.stream, LLM.queue):
        taken = inspect.signature(call).parameters
        for f in fields(Queueing):
            assert taken[f.name].default == f.default, (call, f.name)
    asked = inspect.signature(AsyncLLM.generate).parameters
    assert {f.name: f.default for f in fields(Queueing)} == {
        f.name: asked[f.name].default for f in fields(Queueing)
    }


@pytest.mark.parametrize("priority", [-(2**62) - 1, 2**31])
def test_a_priority_beyond_all_bounds_is_refused(llm: LLM, priority: int) -> None:
    with pytest.raises(RequestError, match="priority"):
        llm.generate([[5, 6]], PARAMS, priority=priority)
    assert llm.generate([[5, 6]], PARAMS)[0].outputs[0].token_ids
