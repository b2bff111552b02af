"""Every option is decided once, before loading, with a reason; what memory buys is known then."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from core_test_plugins.null import SPEC, NullBackend

from core.contract.errors import ConfigError, RequestError, UnsupportedError
from core.contract.hookspecs import hookimpl
from core.contract.requests import ProbeRequest
from core.contract.spec import BatchRules, CacheRules, ShapeRules
from core.contract.types import CacheLayerSpec, DeviceInfo, MemoryInfo
from core.engine.config import EngineConfig
from core.engine.engine import Engine, explain
from core.engine.llm import LLM
from core.engine.resolve import Facts, resolve
from core.models.config import ModelConfig, RopeConfig
from core.plugins import Plugins
from core.sampling.params import SamplingParams

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
LAYER = CacheLayerSpec(kind="paged", dtype="float32", num_kv_heads=1, head_size=8, v_head_size=8)


def facts(free: int = 100 * MIB, weights: int = 20 * MIB, max_position: int = 32768, **spec: object) -> Facts:
    """A model of one layer, of which a block of one token takes 64 bytes."""
    return Facts(
        spec=replace(SPEC, **spec),  # type: ignore[arg-type]
        backend_reason="named",
        model=model(max_position),
        layers=lambda dtype: (replace(LAYER, dtype=dtype),),
        weight_bytes=lambda dtype: weights,
        memory=MemoryInfo(total_bytes=2 * free, free_bytes=free, kind="measured"),
        block_bytes=lambda layer, size: 64 * size,
    )


def model(max_position: int) -> ModelConfig:
    return ModelConfig(
        architecture="X",
        family="x",
        num_layers=1,
        vocab_size=10,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_size=8,
        mlp_size=8,
        norm_eps=1e-6,
        max_position=max_position,
        rope=RopeConfig(theta=1e4, rotary_size=8),
        layer_kinds=("attention",),
        dtype="bfloat16",
    )


def config(**options: object) -> EngineConfig:
    return EngineConfig.of({"model": Path("m"), **options})


def why(found: object, option: str) -> str:
    return next(c.why for c in found.choices if c.option == option)  # type: ignore[attr-defined]


def test_every_option_has_a_value_and_a_reason() -> None:
    found = resolve(config(), facts())
    assert [c.option for c in found.choices] == [f.name for f in fields(EngineConfig)]
    assert all(c.value and c.why for c in found.choices)


def test_the_same_options_and_facts_give_the_same_decisions() -> None:
    assert resolve(config(), facts()) == resolve(config(), facts())


def test_the_cache_takes_its_share_of_what_weights_leave_and_no_more_than_requests_can_use() -> None:
    found = resolve(config(max_requests=200), facts(free=100 * MIB, weights=20 * MIB))
    assert 0.59 * 80 * MIB < found.cache.num_bytes <= 0.6 * 80 * MIB
    assert "80 MiB" in why(found, "kv_cache_bytes")
    small = resolve(config(max_model_len=160, max_requests=2), facts())
    assert small.cache.num_tokens == 320


def test_a_budget_that_is_given_is_kept() -> None:
    found = resolve(config(kv_cache_bytes=10 * MIB), facts())
    assert 9.9 * MIB < found.cache.num_bytes <= 10 * MIB and why(found, "kv_cache_bytes") == "given"


def test_the_summary_says_what_the_memory_buys() -> None:
    found = resolve(config(max_model_len=160, max_requests=2), facts())
    assert "20 MiB of bfloat16 weights" in found.summary()
    assert "20 blocks of 16 = 320 tokens, 2.0 requests of 160 tokens" in found.summary()


def test_weights_that_do_not_fit_are_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match=r"weights need 120 MiB, but the device has 100 MiB free"):
        resolve(config(), facts(weights=120 * MIB))


@pytest.mark.parametrize(
    ("given", "position", "length", "reason"),
    [
        (None, 4096, 4096, "made for 4096 positions"),
        (None, 32768, 8192, "usual limit"),
        (20000, 32768, 20000, "given"),
    ],
)
def test_the_length_is_the_models_within_the_usual_limit(
    given: int | None, position: int, length: int, reason: str
) -> None:
    found = resolve(config(max_model_len=given), facts(max_position=position))
    assert found.max_model_len == length and reason in why(found, "max_model_len")


def test_a_length_that_was_not_given_is_what_memory_holds() -> None:
    found = resolve(config(kv_cache_bytes=64 * 16 * 11), facts())
    assert found.max_model_len == 160 and found.cache.full_requests == 1.0
    assert "budget holds one request" in why(found, "max_model_len")
    with pytest.raises(ConfigError, match="does not hold one request of full length"):
        resolve(config(kv_cache_bytes=64 * 16 * 11, max_model_len=161), facts())
    with pytest.raises(ConfigError, match="does not hold one request of full length"):
        resolve(config(kv_cache_bytes=64), facts())


@pytest.mark.parametrize(
    ("limit", "length"),
    [
        ({"batch": BatchRules(max_rows_x_context=1000, min_decode_rows=3)}, 320),
        ({"shapes": ShapeRules(kind="static", width_buckets=(2, 9))}, 144),
    ],
)
def test_the_backends_limits_bound_the_length(limit: dict[str, object], length: int) -> None:
    assert resolve(config(), facts(**limit)).max_model_len == length  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"max_model_len is {length + 1}, but"):
        resolve(config(max_model_len=length + 1), facts(**limit))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "requests", "tokens"),
    [
        ({"batch": BatchRules(max_requests=16, max_tokens=512)}, 16, 512),
        ({"shapes": ShapeRules(kind="static", request_buckets=(4, 8), token_buckets=(32, 128))}, 8, 128),
        ({"shapes": ShapeRules(kind="static", token_buckets=(6,))}, 6, 6),
        ({"batch": BatchRules(max_tokens=128, prefill_multiple=100)}, 29, 128),
        ({"batch": BatchRules(max_tokens=128, prefill_multiple=100, mixed=False)}, 64, 128),
        ({}, 64, 2048),
    ],
)
def test_rows_and_tokens_of_a_step_are_bounded_by_the_backend(
    limit: dict[str, object], requests: int, tokens: int
) -> None:
    found = resolve(config(), facts(**limit))  # type: ignore[arg-type]
    assert (found.max_requests, found.max_batch_tokens) == (requests, tokens)
    assert found.cache.plan.max_requests == requests
    for name, value, default in (("max_requests", requests, 64), ("max_batch_tokens", tokens, 2048)):
        assert why(found, name) == ("default" if value == default else "the most that the backend takes")


def test_blocks_come_in_the_multiples_that_the_backend_wants() -> None:
    rules = CacheRules(block_sizes=(16,), num_blocks_multiple=8)
    assert resolve(config(), facts(cache=rules)).cache.plan.groups[0].num_blocks % 8 == 0
    for count, hint in ((10, "use 16"), (1, "use 8")):
        with pytest.raises(ConfigError, match=f"num_blocks is {count}; .* multiple of 8 .*{hint}"):
            resolve(config(num_blocks=count), facts(cache=rules))
    with pytest.raises(ConfigError, match=r"num_blocks is 1; .*use 2"):
        resolve(config(num_blocks=1), facts())


def test_a_block_table_larger_than_the_backend_takes_is_refused() -> None:
    rules = CacheRules(block_sizes=(16,), max_table_bytes=64 * 100 * 4)
    assert resolve(config(max_model_len=1600), facts(cache=rules))
    with pytest.raises(ConfigError, match="takes 25856 bytes, but backend 'null' takes 25600 at most"):
        resolve(config(max_model_len=1616), facts(cache=rules))


def test_the_dtype_is_the_checkpoints_where_the_backend_computes_in_it() -> None:
    assert resolve(config(), facts()).dtype == "bfloat16"
    other = resolve(config(), facts(dtypes=("float16", "float32")))
    assert other.dtype == "float16" and "bfloat16" in why(other, "dtype")
    with pytest.raises(UnsupportedError, match="does not compute in 'float8'"):
        resolve(config(dtype="float8"), facts())


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no option 'max_request'; did you mean 'max_requests'"):
        config(max_request=3)
    with pytest.raises(ConfigError, match="no option 'zzz'; the options are model, "):
        config(zzz=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_requests", 0),
        ("block_size", 0),
        ("max_waiting", 0),
        ("policy", "random"),
        ("max_batch_tokens", 5),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option} is|max_requests is 64, but a step has 5"):
        config(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("device", 1.5, "a whole number"),
        ("device", True, "a whole number"),
        ("device", None, "a whole number"),
        ("device", -1, "0 or more"),
        ("overlap", True, "a whole number or left out"),
        ("max_requests", "4", "a whole number"),
        ("max_model_len", 64.0, "a whole number or left out"),
        ("prefix_cache", "false", "true or false"),
        ("warm_up", 1, "true or false"),
        ("backend", 5, "a text"),
        ("dtype", None, "a text"),
        ("policy", True, "one of fcfs, priority"),
        ("quantized", None, "one of auto, packed, dequantized"),
        ("backend_options", {"delay": 1}, "texts by name"),
        ("backend_options", "delay=1", "texts by name"),
        ("model", 3, "a path"),
    ],
)
def test_an_option_of_another_type_is_refused(option: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} is .*; it must be {wanted}"):
        config(**{option: value})


def test_numbers_of_numpy_become_plain_ones() -> None:
    found = config(device=np.int64(0), overlap=np.int32(2))
    assert found == config(overlap=2) and type(found.overlap) is type(found.device) is int


@pytest.mark.parametrize("backend", ["cpu", "cpu_reference", "null"])
def test_a_device_that_the_probe_did_not_find_is_refused_and_the_found_ones_named(
    backend: str, tiny_folder: Callable[[str], Path]
) -> None:
    wanted = EngineConfig(model=tiny_folder("llama"), backend=backend, device=99, max_model_len=64)
    words = rf"^device is 99, but backend '{backend}' has no device 99; it has 0 \(.+\): choose among those$"
    for start in (explain, Engine):
        with pytest.raises(ConfigError, match=words):
            start(wanted)


def test_every_rank_has_a_device_where_there_are_several(tiny_folder: Callable[[str], Path]) -> None:
    class Three(NullBackend):
        @hookimpl
        def core_probe(self, request: ProbeRequest) -> list[DeviceInfo]:
            return [DeviceInfo(backend="three", index=i, name=f"chip {i}") for i in (0, 1, 2)]

    plugins = Plugins()
    plugins.register_backend(Three(replace(SPEC, name="three")), "three")
    wanted = EngineConfig(
        model=tiny_folder("llama"), backend="three", device=2, tensor_parallel=2, max_model_len=64
    )
    words = r"device is 2 and tensor_parallel 2, but .* no device 3; it has 0 \(chip 0\), 1 .*, 2 \(chip 2\)"
    with pytest.raises(ConfigError, match=words):
        explain(wanted, plugins=plugins)
    explain(replace(wanted, device=2, tensor_parallel=1), plugins=plugins)


def test_python_and_the_command_line_take_every_option() -> None:
    names = {f.name for f in fields(EngineConfig)}
    taken = set(inspect.signature(LLM.__init__).parameters)
    assert names <= taken
    text = subprocess.run(
        [sys.executable, "-c", "from core.cli import main; main()", "explain", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "TERM": "dumb"},
    ).stdout
    for name in names - {"model", "backend_options"}:
        assert f"--{name.replace('_', '-')}" in text, name
    assert len(names) < 60


def test_defaults_in_python_are_the_configurations() -> None:
    parameters = inspect.signature(LLM.__init__).parameters
    for f in fields(EngineConfig):
        if f.name not in ("model", "backend_options"):
            assert parameters[f.name].default == f.default, f.name


def test_the_page_of_options_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/options.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_explaining_loads_nothing_and_agrees_with_a_start(tiny_folder: Callable[[str], Path]) -> None:
    wanted = EngineConfig(
        model=tiny_folder("llama"), backend="cpu_reference", max_model_len=64, max_requests=2
    )
    told: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.executor.rank.load_model", lambda *a, **k: pytest.fail("a weight was read"))
        expected = explain(wanted)
    engine = Engine(wanted, on_resolved=told.append)
    engine.close()
    assert told == [engine.resolution]
    assert engine.resolution.cache == expected.cache


def test_the_estimate_of_weights_is_what_they_take(tiny_folder: Callable[[str], Path]) -> None:
    wanted = EngineConfig(
        model=tiny_folder("llama"), backend="cpu_reference", dtype="float64", max_model_len=64, max_requests=2
    )
    engine = Engine(wanted)
    rope = 64 * engine.model.rope.rotary_size * 8
    assert engine.resolution.weight_bytes == engine.report.weight_bytes - rope
    engine.close()


def packed_facts(free: int, **change: object) -> Facts:
    """The same model, of which 20 MiB dequantized are 5 MiB packed."""
    return replace(facts(free, **change), packed_bytes=lambda dtype: 5 * MIB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "free", "packed"),
    [
        ({}, 100, False),
        ({}, 26, False),
        ({}, 24, True),
        ({"kv_cache_bytes": 81 * MIB}, 100, True),
        ({"kv_cache_bytes": 79 * MIB}, 100, False),
        ({"quantized": "packed"}, 100, True),
        ({"quantized": "dequantized"}, 24, False),
    ],
)
def test_quantized_weights_stay_packed_where_the_others_leave_no_room(
    options: dict[str, object], free: int, packed: bool
) -> None:
    found = resolve(config(**options), packed_facts(free * MIB))
    assert found.packed is packed
    assert found.weight_bytes == (5 if packed else 20) * MIB
    assert ("packed" in found.summary()) is packed
    reason = why(found, "quantized")
    assert ("given" in reason) is ("quantized" in options)
    assert "room" in reason or "less than" in reason or "given" in reason


def test_packed_is_refused_where_nothing_can_stay_packed() -> None:
    assert not resolve(config(), facts()).packed
    with pytest.raises(ConfigError, match="'packed', but the model has no weights in a scheme"):
        resolve(config(quantized="packed"), facts())
    with pytest.raises(ConfigError, match="one of auto, packed, dequantized"):
        config(quantized="small")


def test_what_a_request_may_be_is_known_with_the_decisions() -> None:
    found = resolve(config(max_model_len=64, num_blocks=3, max_requests=2), facts())
    found.check_ids((0, 9), SamplingParams())
    with pytest.raises(RequestError, match="token id 10 is outside the vocabulary of 10 ids"):
        found.check_ids((5, 10), SamplingParams())
    with pytest.raises(RequestError, match="a parameter names token id 11"):
        found.check_ids((5,), SamplingParams(stop_token_ids=(11,)))
    found.limits.check(16, SamplingParams(max_tokens=16, n=2))
    with pytest.raises(RequestError, match="33 tokens of prompt and output do not fit"):
        found.limits.check(17, SamplingParams(max_tokens=16))
    with pytest.raises(RequestError, match="n is 3, but at most 2"):
        found.limits.check(16, SamplingParams(n=3))


@pytest.mark.parametrize("asked", [{"num_blocks": 10**9}, {"kv_cache_bytes": 10**15}])
def test_a_cache_beyond_the_memory_is_refused_before_weights_are_read(asked: dict[str, int]) -> None:
    lengths = {"max_model_len": 32768, "max_requests": 2048}
    (name,) = asked
    with pytest.raises(ConfigError, match=rf"{name} is 1000.*, but the weights leave 80 of 100 MiB free"):
        resolve(config(**asked, **lengths), facts())


def test_the_values_in_force_are_told() -> None:
    found = {c.option: (c.value, c.why) for c in resolve(config(num_blocks=50), facts()).choices}
    assert (
        found["kv_cache_bytes"][0].startswith(f"{50 * 16 * 64} ")
        and "num_blocks" in found["kv_cache_bytes"][1]
    )
    assert found["num_blocks"][0] == "49" and "50 were given" in found["num_blocks"][1]
    assert found["max_waiting"][0] == "no limit" and found["num_threads"][0] == "the backend's own"


def test_batch_invariance_is_had_where_it_is_promised_and_refused_elsewhere() -> None:
    asked = config(batch_invariant=True)
    assert resolve(asked, facts(determinism="batch_invariant")).choices
    for promised in ("none", "bitwise"):
        with pytest.raises(ConfigError, match=f"promises is '{promised}'"):
            resolve(asked, facts(determinism=promised))


def test_an_unknown_option_of_llm_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="there is no option 'bakend'; did you mean 'backend'"):
        LLM("tiny", bakend="cpu")  # type: ignore[arg-type]
