"""What an engine in a process of its own gives, refuses and stops."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import QueueFullError, RequestError
from core.engine.async_llm import AsyncLLM
from core.engine.config import SERVED_MAX_WAITING, EngineConfig
from core.engine.llm import LLM
from core.engine.outputs import RequestOutput
from core.sampling.params import SamplingParams
from tests.engine.serving import ENDLESS, LONG, config, endless, last, serving, until


@pytest.mark.parametrize("backend", ["null", "cpu_reference"])
def test_sixty_four_streams_at_once_give_what_the_offline_api_gives(folder: Path, backend: str) -> None:
    options = config(folder, backend=backend, max_requests=64)
    prompts: list[str | list[int]] = [[5 + i % 7, 9, 11 + i] for i in range(62)]
    prompts += ["XYZ", "QW"]
    params = [
        SamplingParams(
            temperature=float(i % 2),
            seed=i,
            n=1 + (i % 9 == 0),
            max_tokens=4 + i % 9,
            ignore_eos=True,
            stop=("Z",) if i % 3 == 0 else (),
        )
        for i in range(64)
    ]
    with LLM(
        folder,
        backend=backend,
        dtype="float32",
        max_model_len=128,
        max_requests=64,
        show_progress=False,
    ) as offline:
        wanted = offline.generate(prompts, params)

    async def body(llm: AsyncLLM) -> None:
        streams = [last(llm.generate(p, s)) for p, s in zip(prompts, params, strict=True)]
        found = await asyncio.gather(*streams)
        assert [o.outputs for o in found] == [o.outputs for o in wanted]
        assert [(o.prompt, o.prompt_token_ids) for o in found] == [
            (o.prompt, o.prompt_token_ids) for o in wanted
        ]
        assert await llm.drain(5)
        m = llm.metrics()
        assert (m.num_running, m.num_waiting, m.blocks_used) == (0, 0, 0)
        assert m.prompt_tokens == sum(len(o.prompt_token_ids) for o in found)
        assert sum(m.finished.values()) == sum(len(o.outputs) for o in found)
        assert m.generated_tokens >= sum(len(c.token_ids) for o in found for c in o.outputs)

    serving(options, body)


def test_a_stop_text_ends_a_stream_before_it_and_gives_its_blocks_back(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        whole = await last(llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=20)))
        text = whole.outputs[0].text
        params = SamplingParams(temperature=0, max_tokens=LONG - 100, stop=(text[3:5],))
        cut = (await last(llm.generate([5, 6, 7], params))).outputs[0]
        assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[:3], "stop", text[3:5])
        assert await llm.drain(5)
        assert llm.metrics().blocks_used == 0
        assert llm.metrics().finished["stop"] == 1
        assert llm.metrics().generated_tokens < 20 + LONG // 2

    serving(endless(folder), body)


def test_a_second_request_with_the_same_beginning_is_cached_and_a_salt_parts_them(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=2)
        cached = []
        for salt in ("a", "a", "b"):
            cached.append((await last(llm.generate(list(range(5, 70)), params, salt=salt))).num_cached_tokens)
        assert cached == [0, 64, 0]
        assert llm.metrics().prefix_hit_tokens == llm.metrics().cached_tokens == 64
        assert llm.metrics().prefix_query_tokens == 3 * 65

    serving(config(folder), body)


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_whoever_leaves_frees_the_blocks(folder: Path, how: str) -> None:
    async def body(llm: AsyncLLM) -> None:
        seen: list[RequestOutput] = []

        async def listen() -> None:
            async with aclosing(llm.generate([5, 6, 7], ENDLESS, request_id="mine")) as outputs:
                async for output in outputs:
                    seen.append(output)
                    if how == "close" and len(seen) == 3:
                        return

        task = asyncio.create_task(listen())
        await until(lambda: len(seen) >= 3)
        if how == "cancel":
            task.cancel()
        elif how == "abort":
            await llm.abort("unknown")
            await llm.abort("mine")
        await asyncio.wait([task])
        await until(lambda: llm.metrics().blocks_used == 0)
        assert llm.metrics().finished == {"abort": 1}
        assert (seen[-1].outputs[0].finish_reason == "abort") == (how == "abort")
        again = await last(llm.generate([5, 6, 7], SamplingParams(max_tokens=2), request_id="mine"))
        assert again.request_id == "mine"

    serving(endless(folder), body)


def test_an_abort_while_the_prompt_is_tokenized_is_not_lost(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm.generate("XY" * 2000, ENDLESS, request_id="mine")))
        await asyncio.sleep(0)
        await llm.abort("mine")
        assert (await task).outputs[0].finish_reason == "abort"

    serving(endless(folder), body)


@pytest.mark.parametrize("length", [3, 1100], ids=["at once", "in a thread"])
def test_a_text_gets_its_special_tokens_unless_told_otherwise(folder: Path, length: int) -> None:
    async def body(llm: AsyncLLM) -> None:
        def encode(tokenizer: object, text: str, add_special_tokens: bool = True) -> list[int]:
            return [3] * add_special_tokens + [7, 8]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(llm.tokenizer), "encode", encode)
            params, found = SamplingParams(max_tokens=1), []
            for given in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
                found.append((await last(llm.generate("x" * length, params, **given))).prompt_token_ids)
        assert found == [(3, 7, 8), (3, 7, 8), (7, 8)]

    serving(config(folder), body)


def test_a_request_that_waits_too_long_ends_as_deadline(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        running = asyncio.create_task(last(llm.generate([5, 6], ENDLESS, request_id="first")))
        await until(lambda: llm.metrics().num_running == 1)
        for wrong in ({"timeout_s": float("nan")}, {"queue_timeout_s": -1.0}, {"priority": 1.5}):
            with pytest.raises(RequestError, match=next(iter(wrong))):
                await last(llm.generate([5], ENDLESS, **wrong))  # type: ignore[arg-type]
        late = await last(llm.generate([5, 6], ENDLESS, queue_timeout_s=0.05))
        assert late.outputs[0].finish_reason == "deadline"
        await llm.abort("first")
        await running
        assert (await last(llm.generate([5], ENDLESS, timeout_s=0.05))).outputs[0].finish_reason == "deadline"

    serving(endless(folder, max_requests=1), body)


def test_a_lower_priority_goes_first_under_that_policy(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        ended = []

        async def ask(name: str, priority: int) -> None:
            await last(llm.generate([5, 6], SamplingParams(max_tokens=3), request_id=name, priority=priority))
            ended.append(name)

        running = asyncio.create_task(last(llm.generate([5, 6], ENDLESS, request_id="first")))
        await until(lambda: llm.metrics().num_running == 1)
        asked = [asyncio.create_task(ask(*o)) for o in (("late", 5), ("early", -1), ("middle", 0))]
        await until(lambda: llm.metrics().num_waiting == 3)
        await llm.abort("first")
        await asyncio.gather(running, *asked)
        assert ended == ["early", "middle", "late"]

    serving(endless(folder, max_requests=1, policy="priority"), body)


def test_a_request_tells_how_often_its_blocks_were_taken(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        found = await asyncio.gather(*(last(llm.generate([i] * 40, params)) for i in range(5, 11)))
        counts = [o.metrics.num_preemptions for o in found]
        assert sum(counts) == llm.metrics().preemptions > 0
        assert min(counts) == 0, "the first to come keeps its blocks"

    serving(config(folder, num_blocks=30, block_size=16), body)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ([5] * 128, {}, "the prompt has 128 tokens"),
        ([300], {}, "outside the vocabulary of 256"),
        ([-1], {}, "outside the vocabulary of 256"),
        ([1.5], {}, "neither a text nor a sequence of token ids"),
        ("\ud800", {}, "Unicode"),
        ([5], {"n": 9}, "at most 8 sequences"),
    ],
    ids=["empty", "long", "large-id", "negative-id", "float", "surrogate", "n"],
)
def test_a_request_that_cannot_run_is_refused_and_the_others_go_on(
    folder: Path, prompt: Any, params: dict[str, int], words: str
) -> None:
    async def body(llm: AsyncLLM) -> None:
        other = asyncio.create_task(
            last(llm.generate([5, 6], SamplingParams(max_tokens=50, ignore_eos=True)))
        )
        with pytest.raises(RequestError, match=words):
            await last(llm.generate(prompt, SamplingParams(**params)))  # type: ignore[arg-type]
        assert len((await other).outputs[0].token_ids) == 50
        assert await llm.drain(5)

    serving(config(folder), body)


@pytest.mark.parametrize(
    "extra", [{"priority": "high"}, {"priority": 2**80}, {"salt": "\ud800"}, {"salt": 5}]
)
def test_values_that_cannot_cross_are_the_request_s_fault(folder: Path, extra: dict[str, Any]) -> None:
    async def body(llm: AsyncLLM) -> None:
        with pytest.raises(RequestError, match=r"cannot be sent|it must be a"):
            await last(llm.generate([5], SamplingParams(), **extra))
        assert (await last(llm.generate([5], SamplingParams(max_tokens=1)))).finished

    serving(config(folder), body)


def test_an_id_is_unique_among_live_requests(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        async with aclosing(llm.generate([5], ENDLESS, request_id="mine")) as outputs:
            await anext(outputs)
            with pytest.raises(RequestError, match="'mine' is in use"):
                await last(llm.generate([5], ENDLESS, request_id="mine"))

    serving(endless(folder), body)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(last(llm.generate([5], ENDLESS, request_id=str(i)))) for i in range(5)]
        await until(lambda: llm.metrics().num_running == 2 and llm.metrics().num_waiting == 3)
        for _ in range(3):
            with pytest.raises(QueueFullError, match="at most 2 may run and 3 wait"):
                await last(llm.generate([5], ENDLESS))
        await llm.abort("4")
        await tasks[4]
        short = asyncio.create_task(last(llm.generate([5], SamplingParams(max_tokens=1))))
        await asyncio.sleep(0)
        for i in range(4):
            await llm.abort(str(i))
        assert (await short).outputs[0].finish_reason == "length"

    serving(endless(folder, max_requests=2, max_waiting=3), body)


def test_the_limit_of_a_queue_that_is_not_given_is_the_one_that_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (told,) = (f.metadata["otherwise"] for f in fields(EngineConfig) if f.name == "max_waiting")
    assert f"{SERVED_MAX_WAITING} for" in told
    monkeypatch.setattr("core.engine.config.SERVED_MAX_WAITING", 2)

    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(last(llm.generate([5], ENDLESS, request_id=str(i)))) for i in range(3)]
        await until(lambda: llm.metrics().num_running == 1 and llm.metrics().num_waiting == 2)
        with pytest.raises(QueueFullError, match="at most 1 may run and 2 wait"):
            await last(llm.generate([5], ENDLESS))
        for i, task in enumerate(tasks):
            await llm.abort(str(i))
            await task

    serving(endless(folder, max_requests=1), body)


def test_draining_finishes_what_runs_and_takes_no_more(folder: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=2000, ignore_eos=True, detokenize=False)
        running = asyncio.create_task(last(llm.generate([5], params)))
        await until(lambda: llm.metrics().num_running == 1)
        assert not await llm.drain(0.01)
        with pytest.raises(QueueFullError, match="no more requests"):
            await last(llm.generate([5], params))
        assert await llm.drain(30)
        assert len((await running).outputs[0].token_ids) == 2000

    serving(endless(folder), body)
