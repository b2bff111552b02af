"""Programs are made when the backend's shape rules say so, and host buffers hold every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from core_test_plugins.null import SPEC, NullBackend
from core_test_plugins.null_device import NullDevice

from core.contract.errors import DeviceError, EngineDead
from core.contract.hookspecs import hookimpl
from core.contract.interfaces import CompileRequest, Program
from core.contract.spec import BackendSpec, BatchRules, ShapeRules
from core.contract.types import Bucket
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.plugins import Plugins
from core.sampling.params import SamplingParams

Folder = Callable[[str], Path]
STATIC = ShapeRules(kind="static", token_buckets=(8, 16), request_buckets=(2, 4), width_buckets=(2, 4))


class Recorder(NullBackend):
    """The null backend, noting which buckets it compiles."""

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        self.compiled: list[Bucket] = []

    @hookimpl
    def core_compile(self, request: CompileRequest) -> Program:
        """See `core.contract.hookspecs`."""
        self.compiled.append(request.bucket)
        return NullBackend.core_compile(self, request)


@contextmanager
def engine_of(backend: Recorder, model: Path, *, warm_up: bool = False) -> Iterator[Engine]:
    plugins = Plugins()
    plugins.register_backend(backend, backend.spec.name)
    config = EngineConfig(
        model=model,
        backend=backend.spec.name,
        max_model_len=64,
        max_requests=4,
        max_batch_tokens=16,
        block_size=16,
        warm_up=warm_up,
    )
    engine = Engine(config, plugins=plugins)
    yield engine
    device = engine._executor._worker.device  # type: ignore[attr-defined]
    assert isinstance(device, NullDevice) and device.violations == []
    engine.close()


def backend_of(shapes: ShapeRules, min_decode_rows: int = 1) -> Recorder:
    rules = BatchRules(min_decode_rows=min_decode_rows)
    return Recorder(replace(SPEC, name="recorder", shapes=shapes, batch=rules))


def serve(engine: Engine) -> None:
    """Prompts of every length up to 40 tokens, four at a time."""
    params = SamplingParams(temperature=0, max_tokens=20)
    for length in range(1, 41):
        engine.add(f"r{length}", list(range(1, 1 + length)), params)
    while engine.has_work:
        engine.step()


def test_a_static_backend_compiles_everything_before_serving_and_nothing_after(tiny_folder: Folder) -> None:
    backend = backend_of(STATIC)
    with engine_of(backend, tiny_folder("llama")) as engine:
        beforehand = list(backend.compiled)
        assert {b.kind for b in beforehand} == {"decode", "prefill", "mixed"}
        serve(engine)
        assert backend.compiled == beforehand and len(set(beforehand)) == len(beforehand)


def test_a_shape_that_a_static_backend_did_not_compile_beforehand_is_an_error(tiny_folder: Folder) -> None:
    backend = backend_of(STATIC)
    with engine_of(backend, tiny_folder("llama")) as engine:
        runner = engine._executor._worker.runner  # type: ignore[attr-defined]
        runner._programs = {b: p for b, p in runner._programs.items() if b.max_seq != 64}
        with pytest.raises(EngineDead, match="was not compiled before serving") as caught:
            serve(engine)
        assert isinstance(caught.value.__cause__, DeviceError)


def test_a_bucketed_backend_compiles_each_bucket_when_it_is_met_first(tiny_folder: Folder) -> None:
    backend = backend_of(replace(STATIC, kind="bucketed"))
    with engine_of(backend, tiny_folder("llama")) as engine:
        assert backend.compiled == []
        serve(engine)
        assert len(set(backend.compiled)) == len(backend.compiled) > 1


@pytest.mark.parametrize("warm_up", [True, False])
def test_a_dynamic_backend_makes_one_program(warm_up: bool, tiny_folder: Folder) -> None:
    backend = backend_of(ShapeRules())
    with engine_of(backend, tiny_folder("llama"), warm_up=warm_up) as engine:
        assert len(backend.compiled) == int(warm_up)
        serve(engine)
        assert len(backend.compiled) == 1


@pytest.mark.parametrize("kind", ["dynamic", "bucketed"])
def test_host_buffers_hold_decode_steps_padded_beyond_every_request(kind: str, tiny_folder: Folder) -> None:
    backend = backend_of(ShapeRules(kind=kind), min_decode_rows=50)  # type: ignore[arg-type]
    with engine_of(backend, tiny_folder("llama")) as engine:
        serve(engine)
