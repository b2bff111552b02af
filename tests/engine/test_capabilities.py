"""A model that needs what the backend does not declare is refused before a device is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_test_plugins.null import NullBackend

from backends.cpu_reference.plugin import SPEC
from core.contract.errors import UnsupportedError
from core.contract.hookspecs import hookimpl
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.plugins import Plugins


class Unopened(NullBackend):
    """Fails where its device is opened."""

    @hookimpl
    def core_open_device(self, request: Any) -> Any:
        raise AssertionError("the device was opened")


@pytest.mark.parametrize(
    ("model", "capability"),
    [
        ("gemma2", "soft_cap"),
        ("gpt_oss", "sinks"),
        ("llama4", "chunk"),
        ("llama4", "q_scale"),
        ("mistral", "window"),
        ("deepseek_v3", "latent"),
    ],
)
def test_what_attention_cannot_do_is_refused(
    model: str, capability: str, tiny_folder: Callable[[str], Path]
) -> None:
    plugins = Plugins()
    lacking = replace(SPEC, name="some", attention=replace(SPEC.attention, **{capability: False}))
    plugins.register_backend(Unopened(lacking), "some")
    config = EngineConfig(model=tiny_folder(model), backend="some", max_model_len=64)
    words = "latent attention" if capability == "latent" else capability
    with pytest.raises(UnsupportedError, match=f"'some' does not declare .*{words}"):
        Engine(config, plugins=plugins)
