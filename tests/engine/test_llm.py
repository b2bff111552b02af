"""The offline API, on the sample model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core import LLM, SamplingParams
from core.contract.errors import ConfigError, PluginError, RequestError, UnsupportedError

pytestmark = pytest.mark.sample

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        "sample", backend="cpu", dtype="float32", max_model_len=256, max_requests=8, show_progress=False
    ) as llm:
        yield llm


def test_results_keep_the_order_of_prompts_and_equal_single_runs(llm: LLM) -> None:
    prompts = ["The capital of France is", "Two plus two is", "A cat is"]
    together = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in together] == prompts
    assert "Paris" in together[0].outputs[0].text
    for prompt, output in zip(prompts, together, strict=True):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_token_ids_and_text_prompts_agree(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The capital of France is")
    by_ids, by_text = llm.generate(ids, GREEDY), llm.generate("The capital of France is", GREEDY)
    assert by_ids[0].prompt_token_ids == by_text[0].prompt_token_ids == tuple(ids)
    assert by_ids[0].outputs[0].text == by_text[0].outputs[0].text


def test_more_prompts_than_slots_all_finish(llm: LLM) -> None:
    outputs = llm.generate([f"Number {i} is" for i in range(20)], SamplingParams(temperature=0, max_tokens=3))
    assert len({o.request_id for o in outputs}) == 20
    assert all(len(o.outputs[0].token_ids) == 3 and o.outputs[0].finish_reason == "length" for o in outputs)


def test_seeds_decide_random_outputs(llm: LLM) -> None:
    def text(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12)
        return llm.generate("My favourite food is", params)[0].outputs[0].token_ids

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


def test_n_continuations_differ_and_share_blocks(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=24, ignore_eos=True)
    streams = llm.stream(
        ["Here is a long beginning that fills more than a block of tokens: one, two, three,"], params
    )
    shared, last = 0, None
    for output in streams:
        shared, last = max(shared, llm.engine.metrics().blocks_shared), output
    assert last is not None
    assert len({o.token_ids for o in last.outputs}) == 4
    assert shared >= 1


def test_second_request_with_the_same_beginning_is_cached(llm: LLM) -> None:
    prompt = (
        "All of this text is common to both requests, and it is long enough to fill some blocks of the cache."
    )
    llm.generate(prompt + " First.", GREEDY)
    again = llm.generate(prompt + " Second.", GREEDY)[0]
    assert again.num_cached_tokens >= 16


def test_stop_text_ends_the_output_before_it(llm: LLM) -> None:
    whole = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=16))[0].outputs[
        0
    ]
    stop = whole.text[6:9]
    cut = llm.generate(
        "The capital of France is", SamplingParams(temperature=0, max_tokens=16, stop=(stop,))
    )[0]
    assert cut.outputs[0].text == whole.text[: whole.text.find(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].stop_reason == stop
    assert llm.engine.metrics().blocks_used == 0


def test_stop_token_ends_the_output(llm: LLM) -> None:
    whole = llm.generate("The capital of France is", GREEDY)[0].outputs[0]
    stop = whole.token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,))
    cut = llm.generate("The capital of France is", params)[0].outputs[0]
    first = whole.token_ids.index(stop)
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24))[0]
    assert "Paris" in output.outputs[0].text
    assert output.prompt_token_ids[0] == llm.tokenizer.encode("<|im_start|>", add_special_tokens=False)[0]


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ([5] * 256, {}, "the prompt has 256 tokens"),
        ([10**6], {}, "outside the vocabulary"),
        ([5], {"n": 9}, "at most 8 sequences"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_changes_nothing(
    llm: LLM, prompt: list[int], params: dict[str, int], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate([[5, 6], prompt], [GREEDY, SamplingParams(**params)])  # type: ignore[arg-type]
    assert not llm.engine.scheduler.num_waiting
    assert llm.generate("A cat is", GREEDY)[0].finished


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ("",)}, "stop holds"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(option: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**option)  # type: ignore[arg-type]


def test_unknown_backend_names_those_installed() -> None:
    with pytest.raises(PluginError, match=r"installed.*cpu"):
        LLM("sample", backend="abacus", show_progress=False)


def test_missing_model_names_the_path() -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        LLM("no-such-model", show_progress=False)


def test_tensor_parallelism_that_does_not_divide_is_refused_before_loading() -> None:
    with pytest.raises(UnsupportedError, match="9 attention heads and 3 KV heads"):
        LLM("sample", backend="cpu", tensor_parallel=2, show_progress=False)


def test_cache_budget_too_small_for_one_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold one request"):
        LLM(
            "sample",
            backend="cpu",
            dtype="float32",
            kv_cache_bytes=2**20,
            max_model_len=2048,
            show_progress=False,
        )
