"""Models and engine never touch a device behind its backend's back, and their caller keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_test_plugins.null_device import NullDevice, null_token
from core_test_plugins.pretend.tensor import DEVICE, PretendTensor, set_up, to_device, to_host

from core.contract.errors import DeviceError
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams
from tests.engine.recorder import prompt
from tests.models.tiny import make_folder

FAMILIES = ("llama", "llama3_rope", "qwen2", "qwen3")
MAX_TOKENS = 30
Tokens = dict[str, list[int]]


@pytest.fixture
def x() -> PretendTensor:
    set_up()
    return to_device(torch.arange(12.0).reshape(3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_folder(name, root / name)
        return made[name]

    return get


def test_a_result_stays_on_the_device(x: PretendTensor) -> None:
    y = torch.nn.functional.linear(x, to_device(torch.ones(5, 4)))
    assert isinstance(y, PretendTensor) and str(y.device) == DEVICE
    assert to_host(y).tolist() == [[6.0] * 5, [22.0] * 5, [38.0] * 5]


def test_factories_and_views_work_on_the_device(x: PretendTensor) -> None:
    x[1].fill_(7.0)
    rows = torch.arange(2, device=x.device)
    assert to_host(x.index_select(0, rows)).tolist() == [[0.0, 1.0, 2.0, 3.0], [7.0] * 4]
    assert to_host(torch.zeros(2, device=x.device) + 1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3, 4),
        lambda x: torch.ones(3, 4) * x,
        lambda x: x.index_select(0, torch.tensor([0, 1])),
        lambda x: x.copy_(torch.ones(3, 4)),
        lambda x: torch.cat([x, torch.ones(3, 4)]),
    ],
)
def test_mixing_with_a_host_tensor_is_refused(x: PretendTensor, mix: Callable[..., object]) -> None:
    with pytest.raises(DeviceError, match="mixes pretend:0 with a host tensor"):
        mix(x)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 3],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: int(x.argmax()),
    ],
)
def test_reading_a_value_inside_a_step_is_refused(x: PretendTensor, read: Callable[..., object]) -> None:
    with pytest.raises(DeviceError, match="makes the host wait"):
        read(x)


@pytest.mark.parametrize("reach", [lambda x: x.numpy(), lambda x: x.tolist()])
def test_memory_of_the_device_is_out_of_reach(x: PretendTensor, reach: Callable[..., object]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        reach(x)


def test_a_host_tensor_is_no_result_of_the_device() -> None:
    with pytest.raises(DeviceError, match="was computed on the host"):
        to_host(torch.ones(2))


def generate(model: Path, backend: str, **options: object) -> tuple[Tokens, Engine]:
    """Six greedy requests of different lengths, four at once; the engine is still open."""
    settings: dict[str, object] = {"num_blocks": 60, **options}
    config = EngineConfig(
        model=model,
        backend=backend,
        dtype="float32",
        block_size=8,
        max_requests=4,
        max_batch_tokens=48,
        max_model_len=128,
        **settings,  # type: ignore[arg-type]
    )
    engine = Engine(config)
    for i in range(6):
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        engine.add(f"r{i}", prompt(5 + 7 * i, i), params)
    out: Tokens = {}
    for _ in range(500):
        if not engine.has_work:
            return out, engine
        for event in engine.step():
            if event.token >= 0:
                out.setdefault(event.sequence.request.request_id, []).append(event.token)
    raise AssertionError("the engine does not end")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_gives_on_the_pretend_device_what_it_gives_on_the_cpu(
    folder: Callable[[str], Path], family: str
) -> None:
    wanted, engine = generate(folder(family), "cpu")
    engine.close()
    found, engine = generate(folder(family), "pretend")
    engine.close()
    assert found == wanted and len(found) == 6


@pytest.mark.parametrize("num_blocks", [60, 17])
@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_the_engine_keeps_the_contract_on_the_null_backend(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, overlap: int, delay: int, num_blocks: int
) -> None:
    opened: list[NullDevice] = []
    start = NullDevice.__init__

    def remember(self: NullDevice, *arguments: object) -> None:
        start(self, *arguments)  # type: ignore[arg-type]
        opened.append(self)

    monkeypatch.setattr(NullDevice, "__init__", remember)
    found, engine = generate(
        folder("llama"),
        "null",
        overlap=overlap,
        num_blocks=num_blocks,
        backend_options={"delay": str(delay)},
    )
    preemptions = engine.metrics().preemptions
    engine.close()
    (device,) = opened
    assert device.violations == []
    assert (preemptions > 0) is (num_blocks == 17)
    for i in range(6):
        first = 5 + 7 * i
        assert found[f"r{i}"] == [null_token(p, 256) for p in range(first, first + MAX_TOKENS)]
