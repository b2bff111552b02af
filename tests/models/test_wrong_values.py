"""Each field of a family's config.json in turn is given values of other kinds: each is refused by file,
field, found and wanted, or taken; none brings another error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from core.contract.errors import ConfigError, UnsupportedError, WeightError
from core.executor.rank import read_model
from core.models.fields import KINDS
from core.weights.checkpoint import open_checkpoint

from .tiny import FAMILIES

VALUES: tuple[Any, ...] = (
    *(None, "x", "", "4", 1.5, float("nan"), True, False, 0, -1, 2**62),
    *([], [1], ["x"], [None], [{}], {}, {"a": 1}),
)


def places(config: Mapping[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a configuration has fields that a family may read."""
    for name, value in config.items():
        if name in KINDS:
            yield (*within, name)
        if isinstance(value, Mapping) and name in KINDS:
            yield from places(value, (*within, name))


def with_value(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = place
    return {**config, first: with_value(config[first], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_every_field_refuses_values_of_other_kinds(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_folder(family) / "config.json").read_text())
    found = list(places(config))
    assert len(found) > 12
    file = tmp_path / "config.json"
    for place in found:
        for value in VALUES:
            file.write_text(json.dumps(with_value(config, place, value)))
            where = f"{'.'.join(place)}={value!r}"
            try:
                read_model(open_checkpoint(tmp_path, "dummy"))
            except (ConfigError, UnsupportedError) as e:
                message = str(e)
                assert "\n" not in message and "cannot be read as that" not in message, where
                assert message.startswith(f"{file}: ") and len(message) < 900, (where, message)
            else:
                message = ""
            if value is not None and not KINDS[place[-1]].holds(value):
                assert f"the config's {'.'.join(place)} is {value!r}, but it must be " in message, where


@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_every_field_that_is_left_out_has_a_default_or_is_named(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Null and absent are the same, but where null says that there is no such thing."""
    config = json.loads((tiny_folder(family) / "config.json").read_text())
    file = tmp_path / "config.json"
    for place in places(config):
        *outer, name = place
        inner = config
        for key in outer:
            inner = inner[key]
        absent = {k: v for k, v in inner.items() if k != name}
        answers = []
        for text in (
            json.dumps(with_value(config, tuple(outer), absent) if outer else absent),
            json.dumps(with_value(config, place, None)),
        ):
            file.write_text(text)
            try:
                answers.append(str(read_model(open_checkpoint(tmp_path, "dummy"))[1]))
            except (ConfigError, UnsupportedError) as e:
                answers.append(str(e))
                assert str(e).startswith(f"{file}: ")
        if name not in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            assert answers[0] == answers[1], place


@pytest.mark.parametrize("value", ["fp8", "compressed-tensors", [1], 7, True, {"quant_method": 7}])
def test_a_quantization_of_another_kind_is_refused_by_name(
    value: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    (tmp_path / "model.safetensors").symlink_to(tiny_folder("llama") / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"/config\.json: the config's quantization_config is .*, but it must be"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", ["x", [1], [0, 128], [1.5, 2], [True, True], {}, 128])
def test_a_block_size_of_another_kind_is_refused_by_name(
    value: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": value}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (tmp_path / "model.safetensors").symlink_to(tiny_folder("llama") / "model.safetensors")
    with pytest.raises(WeightError, match=r"/config\.json: weight_block_size is .* are wanted; check"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "null", "[" * 100_000, "{"])
def test_a_generation_config_that_is_no_object_is_refused(
    text: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json (holds|cannot be read)"):
        read_model(open_checkpoint(tmp_path, "dummy"))
