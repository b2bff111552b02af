"""Loading opens the device asked for and tells how far it is: bytes, tensors, speed; of the first rank where
there are several.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from core import LLM, SamplingParams
from core.contract.errors import ConfigError, DeviceError
from core.contract.interfaces import Device
from core.contract.requests import DeviceRequest
from core.contract.types import DeviceInfo
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.plugins import BackendHandle, Plugins
from core.weights.loader import LoadState
from tests.models.conftest import tiny_folder

__all__ = ["tiny_folder"]


def loaded(folder: Path, **options: Any) -> list[LoadState]:
    states: list[LoadState] = []
    config = EngineConfig(model=folder, dtype="float32", max_model_len=64, **options)
    Engine(config, progress=states.append).close()
    return states


def test_progress_grows_to_every_byte_and_tensor_of_the_files(folder: Path) -> None:
    states, tensors = loaded(folder, backend="cpu_reference"), load_file(folder / "model.safetensors")
    phases = [state.phase for state in states]
    assert phases == sorted(phases) and phases.count("checking") == len(tensors)
    for phase in ("checking", "loading"):
        own = [state for state in states if state.phase == phase]
        for before, after in pairwise(own):
            assert before.bytes_done < after.bytes_done and before.tensors_done < after.tensors_done
            assert before.seconds <= after.seconds
        last = own[-1]
        assert last.bytes_done == last.bytes_total == sum(t.nbytes for t in tensors.values())
        assert last.tensors_done == last.tensors_total == len(tensors)
    assert (own[0].bytes_done, own[0].tensors_done) == (0, 0)
    assert last.bytes_per_s == last.bytes_done / last.seconds


def test_a_state_says_bytes_tensors_and_speed() -> None:
    state = LoadState(1_500_000_000, 6_000_000_000, 30, 120, 0.5)
    assert state.sentence() == "1.50 of 6.00 GB, 30 of 120 tensors, 3.00 GB/s"
    assert LoadState(0, 1, 0, 1, 0.0).bytes_per_s == 0


def test_llm_shows_what_it_loaded_where_it_may(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"backend": "cpu_reference", "dtype": "float32", "max_model_len": 64}
    LLM(folder, show_progress=False, **options).close()
    assert not capsys.readouterr().err
    LLM(folder, **options).close()
    captured = capsys.readouterr()
    count = len(load_file(folder / "model.safetensors"))
    pattern = rf"loaded 0\.00 of 0\.00 GB, {count} of {count} tensors, \d+\.\d\d GB/s in \d+\.\d s"
    assert re.search(pattern, captured.err) and not captured.out


@pytest.mark.slow
def test_ranks_share_dummy_weights_and_the_first_tells_its_progress(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    alone, shared = (loaded(tmp_path, backend="cpu", load_format="dummy", tensor_parallel=n) for n in (1, 2))
    assert 0 < shared[-1].bytes_total < 0.7 * alone[-1].bytes_total
    assert shared[-1].tensors_done == alone[-1].tensors_total
    found = []
    for ranks in (1, 2):
        options: dict[str, Any] = {"backend": "cpu", "dtype": "float32", "load_format": "dummy"}
        with LLM(tmp_path, tensor_parallel=ranks, max_model_len=64, show_progress=False, **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            found.append(llm.generate([5, 6, 7], params)[0].outputs[0].token_ids)
    assert found[0] == found[1]


def test_ends_that_only_the_generation_config_names_end_a_text(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    params = SamplingParams(temperature=0, max_tokens=8)
    options: dict[str, Any] = {"backend": "cpu_reference", "dtype": "float32", "show_progress": False}
    with LLM(path, **options) as llm:
        tokens = llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [250, tokens[1]]}))
    with LLM(path, **options) as llm:
        found = llm.generate([[5, 6, 7]], params)[0].outputs[0]
    assert found.finish_reason == "stop" and len(found.token_ids) <= 2
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config"):
        LLM(path, **options)


def test_the_device_and_its_host_threads_are_those_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[DeviceRequest] = []

    def record(self: BackendHandle, request: DeviceRequest) -> Device:
        opened.append(request)
        raise DeviceError("seen")

    three = [DeviceInfo(backend="null", index=i, name="null device") for i in range(3)]
    monkeypatch.setattr(Plugins, "probe", lambda *_: tuple(three))
    monkeypatch.setattr(BackendHandle, "open_device", record)
    cases: list[tuple[dict[str, Any], tuple[int, int | None]]] = [
        ({}, (0, None)),
        ({"num_threads": 3}, (0, 3)),
        ({"device": 2, "num_threads": 1}, (2, 1)),
    ]
    for given, wanted in cases:
        with pytest.raises(DeviceError, match="seen"):
            LLM(folder, backend="null", show_progress=False, **given)
        request = opened.pop()
        assert (request.index, request.num_threads) == wanted
