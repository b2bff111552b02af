"""The plugin host: discovery, the version gate, refusals, selection, and calls of hooks."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from core_test_plugins.null import SPEC, NullBackend
from core_test_plugins.null_device import NullDevice
from core_test_plugins.refused import MISSPELLED_HOOK

from core.contract import CONTRACT, OLDEST_MINOR
from core.contract.errors import ContractVersionError, PluginError
from core.contract.hookspecs import OPTIONAL_HOOKS, REQUIRED_HOOKS, hookimpl
from core.contract.interfaces import AttentionKernel, Observer
from core.contract.opspecs import AttentionSpec
from core.contract.requests import (
    AllocatorRequest,
    AttentionKernelRequest,
    CliRequest,
    CommunicatorRequest,
    ConformanceExtras,
    ConformanceRequest,
    DeviceRequest,
    ObserverRequest,
    OpsRequest,
    OverrideRequest,
    ProbeRequest,
    SamplerRequest,
    SpecRequest,
)
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec, DeviceInfo, PackRequest, Unavailable
from core.plugins import BackendHandle, Plugins


def backend(name: str, **changes: Any) -> NullBackend:
    return NullBackend(replace(SPEC, name=name, **changes))


def with_methods(base: type, *args: Any, **methods: Callable[..., Any]) -> Any:
    """An object of a subclass of `base` with these hook implementations."""
    marked = {name: hookimpl(method) for name, method in methods.items()}
    return type("Changed", (base,), marked)(*args)


def without(plugin: NullBackend, *hooks: str) -> Any:
    """The hooks of a plugin but for some, as bare functions of a new object."""
    kept = set(REQUIRED_HOOKS + OPTIONAL_HOOKS) - set(hooks)
    reduced = type("Reduced", (), {})()
    for name in kept:
        if hasattr(plugin, name):
            setattr(reduced, name, getattr(plugin, name))
    return reduced


class Addon:
    """An add-on that counts nothing and offers nothing."""

    CONTRACT = CONTRACT


@pytest.fixture
def host() -> Plugins:
    return Plugins(disabled=frozenset())


@pytest.fixture(scope="module")
def installed() -> Plugins:
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    return plugins


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, group: str, points: dict[str, str]
) -> None:
    """Put a distribution with entry points on the path, as an installer would leave it."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))


# Discovery


def test_installed_backends_are_found_by_their_entry_points(installed: Plugins) -> None:
    names = [spec.name for spec in installed.specs()]
    assert {"null", "older_contract"} <= set(names)
    assert names == sorted(names)


def test_a_plugin_that_fails_disturbs_no_other_and_is_listed_with_its_reason(installed: Plugins) -> None:
    failures = {failure.name: failure for failure in installed.failures}
    assert "ModuleNotFoundError: No module named 'library_that_is_not_installed'" in (
        failures["broken_import"].reason
    )
    assert "core-test-plugins 0.1.0" in failures["broken_import"].reason
    assert {"broken_import", "misspelled_hook", "newer_contract"} <= failures.keys()
    assert not failures.keys() & {spec.name for spec in installed.specs()}
    assert installed.select("null").devices


def test_a_backend_asked_for_by_name_that_failed_raises_with_its_root_cause(installed: Plugins) -> None:
    for ask in (installed.select, installed.backend, installed.spec, installed.probe):
        with pytest.raises(PluginError, match=r"'broken_import' can't be used: .*library_that_is") as caught:
            ask("broken_import")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_nothing_is_loaded_before_load_and_a_second_load_changes_nothing(host: Plugins) -> None:
    assert host.specs() == () and host.failures == ()
    host.load()
    before = host.specs(), host.failures
    host.load()
    assert (host.specs(), host.failures) == before


def test_a_disabled_plugin_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_DISABLE_PLUGINS", "null, broken_import")
    plugins = Plugins()
    plugins.load()
    assert "null" not in [spec.name for spec in plugins.specs()]
    assert "broken_import" not in [failure.name for failure in plugins.failures]
    with pytest.raises(PluginError, match="'null' is disabled by CORE_DISABLE_PLUGINS"):
        plugins.select("null")


def test_an_unknown_name_is_answered_with_the_installed_ones_and_the_nearest(host: Plugins) -> None:
    host.register_backend(backend("alpha"), "alpha")
    host.register_backend(backend("beta"), "beta")
    with pytest.raises(
        PluginError, match="no backend is named 'alhpa'; installed: alpha, beta, nearest is 'alpha'"
    ):
        host.select("alhpa")


def test_an_addon_is_found_in_its_own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "addon_in_its_group.py").write_text(
        "from core.contract.hookspecs import hookimpl\n"
        "CONTRACT = (0, 1)\n"
        "@hookimpl\n"
        "def core_observer(request):\n"
        "    return [request.engine]\n"
    )
    install(tmp_path, monkeypatch, "addon-dist", "core.plugins", {"watcher": "addon_in_its_group"})
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    assert "watcher" in plugins.addons and "watcher" not in [spec.name for spec in plugins.specs()]
    assert plugins.observers(ObserverRequest(engine="e")) == ("e",)


def test_two_plugins_of_one_name_are_both_refused_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution in ("first-dist", "second-dist"):
        points = {"twin": "core_test_plugins.null:BACKEND"}
        install(tmp_path / distribution, monkeypatch, distribution, "core.backends", points)
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    reason = next(f.reason for f in plugins.failures if f.name == "twin")
    assert "first-dist 1.2" in reason and "second-dist 1.2" in reason
    assert "twin" not in [spec.name for spec in plugins.specs()]


def test_a_module_that_exits_at_import_is_a_failure_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_that_exits.py").write_text("import sys\nsys.exit(3)\n")
    install(tmp_path, monkeypatch, "exit-dist", "core.backends", {"quitter": "module_that_exits"})
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    assert "SystemExit: 3" in next(f.reason for f in plugins.failures if f.name == "quitter")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("CONTRACT = '0.1'\n", "was built for contract '0.1'; it must be two whole numbers"),
        ("CONTRACT = 1\n", "was built for contract 1; it must be two whole numbers"),
        ("CONTRACT = ('0', '1')\n", "it must be two whole numbers"),
        ("def __getattr__(name):\n    raise ImportError('lazily')\n", "lazily"),
    ],
)
def test_a_plugin_that_cannot_even_be_looked_at_disturbs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    (tmp_path / "odd_module.py").write_text(source)
    install(tmp_path, monkeypatch, "odd-dist", "core.plugins", {"odd": "odd_module"})
    plugins = Plugins(disabled=frozenset())
    plugins.load()
    sys.modules.pop("odd_module", None)
    assert told in next(f.reason for f in plugins.failures if f.name == "odd")
    assert "null" in [spec.name for spec in plugins.specs()]


def test_the_host_imports_no_framework() -> None:
    script = (
        "import sys\nfrom core.plugins import Plugins\np = Plugins()\np.load()\np.specs()\n"
        "print(sorted({'torch', 'jax', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The version gate


@pytest.mark.parametrize(
    ("contract", "oldest", "built_for", "loads"),
    [
        ((0, 1), 1, (0, 1), True),
        ((0, 4), 2, (0, 4), True),
        ((0, 4), 2, (0, 2), True),
        ((0, 4), 2, (0, 1), False),
        ((0, 4), 2, (0, 5), False),
        ((0, 4), 2, (1, 3), False),
        ((1, 4), 2, (0, 3), False),
    ],
)
def test_only_contracts_inside_the_window_load(
    contract: tuple[int, int], oldest: int, built_for: tuple[int, int], loads: bool
) -> None:
    plugins = Plugins(contract=contract, oldest_minor=oldest, disabled=frozenset())
    plugin = backend("b", contract=built_for)
    if loads:
        assert plugins.register_backend(plugin, "b").spec.contract == built_for
        return
    with pytest.raises(ContractVersionError) as refused:
        plugins.register_backend(plugin, "b")
    assert f"built for contract {built_for}" in str(refused.value)
    assert f"this core loads ({contract[0]}, {oldest}) to {contract}" in str(refused.value)
    assert plugins.specs() == ()


def test_a_refusal_names_the_fix_for_its_direction() -> None:
    plugins = Plugins(contract=(0, 4), oldest_minor=2, disabled=frozenset())
    with pytest.raises(ContractVersionError, match="install a newer version of the plugin, or an older core"):
        plugins.register_backend(backend("old", contract=(0, 1)), "old")
    with pytest.raises(ContractVersionError, match="upgrade core, or install an older version of the plugin"):
        plugins.register_backend(backend("new", contract=(0, 5)), "new")


def test_an_installed_plugin_of_an_older_contract_loads_in_a_newer_core_that_still_takes_it() -> None:
    for oldest, loads in ((1, True), (2, False)):
        plugins = Plugins(contract=(0, 3), oldest_minor=oldest, disabled=frozenset())
        plugins.load()
        assert ("older_contract" in [s.name for s in plugins.specs()]) is loads


def test_the_version_is_told_before_what_follows_from_it() -> None:
    newer = without(backend("b", contract=(0, 99)), "core_probe")
    with pytest.raises(ContractVersionError):
        Plugins(disabled=frozenset()).register_backend(newer, "b")


def test_a_plugin_is_told_which_contract_asks(host: Plugins) -> None:
    asked: list[SpecRequest] = []

    def core_backend_spec(self: NullBackend, request: SpecRequest) -> BackendSpec:
        asked.append(request)
        return self.spec

    plugin = with_methods(NullBackend, replace(SPEC, name="b"), core_backend_spec=core_backend_spec)
    host.register_backend(plugin, "b")
    assert asked == [SpecRequest(contract=CONTRACT)]
    assert CONTRACT[1] >= OLDEST_MINOR


def test_an_addon_must_state_its_contract(host: Plugins) -> None:
    with pytest.raises(ContractVersionError, match=r"states no contract version .* CONTRACT = "):
        host.register_addon(object(), "plain")
    with pytest.raises(ContractVersionError, match=r"built for contract \(0, 99\)"):
        host.register_addon(type("Newer", (), {"CONTRACT": (0, 99)})(), "newer")
    host.register_addon(Addon(), "fits")
    assert host.addons == ("fits",)


# Refusals


@pytest.mark.parametrize("hook", REQUIRED_HOOKS)
def test_a_backend_without_a_required_hook_is_refused_by_the_hooks_name(host: Plugins, hook: str) -> None:
    with pytest.raises(PluginError, match=rf"plugin 'b' does not implement the hook {hook}\b"):
        host.register_backend(without(backend("b"), hook), "b")
    assert host.specs() == ()


@pytest.mark.parametrize(
    ("hook", "declared"),
    [("core_sampler", "device_sampler"), ("core_communicator", "max_world_size 64")],
)
def test_a_hook_that_the_spec_promises_is_required(host: Plugins, hook: str, declared: str) -> None:
    with pytest.raises(PluginError, match=f"{hook} although it declares {declared}"):
        host.register_backend(without(backend("b"), hook), "b")


def test_a_misspelled_hook_is_refused_with_the_nearest_name(host: Plugins) -> None:
    with pytest.raises(
        PluginError,
        match="implements 'core_memory_alocator', which is no hook, nearest is 'core_memory_allocator'",
    ):
        host.register_backend(MISSPELLED_HOOK, "misspelled_hook")
    host.register_backend(backend("b"), "b")  # nothing of the refused one is left behind


def test_a_misspelled_required_hook_is_told_as_such_and_not_as_missing(host: Plugins) -> None:
    plugin = without(backend("b"), "core_backend_spec")
    plugin.core_backend_spce = hookimpl(lambda request: SPEC)
    with pytest.raises(
        PluginError, match="'core_backend_spce', which is no hook, nearest is 'core_backend_spec'"
    ):
        host.register_backend(plugin, "b")


def test_a_hook_without_its_mark_is_refused(host: Plugins) -> None:
    plugin = backend("b")
    plugin.core_observer = lambda request: []  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="core_observer of plugin 'b' is not marked; put @hookimpl on it"):
        host.register_backend(plugin, "b")


@pytest.mark.parametrize(
    "core_sampler", [lambda self: None, lambda self, request, more=1: None, lambda self, wish: None]
)
def test_a_hook_takes_exactly_the_request(host: Plugins, core_sampler: Callable[..., Any]) -> None:
    plugin = with_methods(NullBackend, replace(SPEC, name="b"), core_sampler=core_sampler)
    if core_sampler.__code__.co_varnames[:2] == ("self", "request"):
        host.register_backend(plugin, "b")  # a default of the plugin's own is its own affair
        return
    with pytest.raises(PluginError, match="core_sampler"):
        host.register_backend(plugin, "b")
    assert host.specs() == ()


def test_a_spec_that_is_no_backend_spec_is_refused(host: Plugins) -> None:
    plugin = with_methods(NullBackend, core_backend_spec=lambda self, request: {"name": "b"})
    with pytest.raises(PluginError, match=r"returned {'name': 'b'}, not a BackendSpec"):
        host.register_backend(plugin, "b")


def test_a_spec_hook_that_raises_is_refused_with_its_cause(host: Plugins) -> None:
    def core_backend_spec(self: NullBackend, request: SpecRequest) -> BackendSpec:
        raise OSError("no such file")

    plugin = with_methods(NullBackend, core_backend_spec=core_backend_spec)
    with pytest.raises(
        PluginError, match="core_backend_spec of plugin 'b' raised OSError: no such"
    ) as caught:
        host.register_backend(plugin, "b")
    assert isinstance(caught.value.__cause__, OSError)


def test_spec_and_entry_point_must_agree_on_the_name(host: Plugins) -> None:
    with pytest.raises(PluginError, match="backend 'b' calls itself 'a'"):
        host.register_backend(backend("a"), "b")


@pytest.mark.parametrize("name", ["Upper", "auto"])
def test_a_name_that_could_be_mistaken_is_refused(host: Plugins, name: str) -> None:
    with pytest.raises(PluginError, match="can't be a backend's name"):
        host.register_backend(backend(name), name)


def test_a_name_is_given_once(host: Plugins) -> None:
    host.register_backend(backend("b"), "b")
    with pytest.raises(PluginError, match="'b' is registered already"):
        host.register_backend(backend("b"), "b")
    with pytest.raises(PluginError, match="'b' is registered already"):
        host.register_addon(Addon(), "b")


# Selection


def probing(name: str, rank: int | None, found: object) -> Any:
    """A backend whose probe gives `found`, or raises it."""

    def core_probe(self: NullBackend, request: ProbeRequest) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    return with_methods(NullBackend, replace(SPEC, name=name, auto_rank=rank), core_probe=core_probe)


def device(name: str) -> list[DeviceInfo]:
    return [DeviceInfo(backend=name, index=0, name=f"{name} device")]


NONE = Unavailable("no driver is loaded", "load it")


@pytest.mark.parametrize("reverse", [False, True])
def test_auto_takes_the_highest_rank_with_a_device_whatever_the_order(host: Plugins, reverse: bool) -> None:
    plugins = [
        ("only_by_name", None, device("only_by_name")),
        ("low", 1, device("low")),
        ("high", 20, device("high")),
        ("top", 30, NONE),
    ]
    for name, rank, found in reversed(plugins) if reverse else plugins:
        host.register_backend(probing(name, rank, found), name)
    selection = host.select("auto")
    assert selection.spec.name == "high"
    assert selection.devices == tuple(device("high"))
    assert "rank 20 is the highest with a device" in selection.reason
    assert "passed over top: no driver is loaded; load it" in selection.reason


def test_auto_probes_nothing_below_the_rank_it_takes(host: Plugins) -> None:
    host.register_backend(probing("high", 20, device("high")), "high")
    host.register_backend(probing("low", 1, AssertionError("probed in vain")), "low")
    assert "low" not in host.select("auto").reason


def test_a_tie_is_an_error_that_names_both(host: Plugins) -> None:
    for name in ("b", "a"):
        host.register_backend(probing(name, 5, device(name)), name)
    host.register_backend(probing("low", 1, device("low")), "low")
    with pytest.raises(PluginError, match="backends a, b have devices and the same rank 5; name the one"):
        host.select("auto")
    assert host.select("a").spec.name == "a"


def test_a_tie_without_a_device_is_none(host: Plugins) -> None:
    host.register_backend(probing("a", 5, device("a")), "a")
    host.register_backend(probing("b", 5, NONE), "b")
    assert host.select("auto").spec.name == "a"


def test_no_device_anywhere_tells_every_reason(host: Plugins) -> None:
    host.register_backend(probing("a", 5, NONE), "a")
    host.register_backend(probing("b", 6, Unavailable("the library is missing")), "b")
    host.register_backend(probing("named", None, device("named")), "named")
    with pytest.raises(PluginError) as caught:
        host.select("auto")
    for part in ("a: no driver is loaded; load it", "b: the library is missing", "only by name: named"):
        assert part in str(caught.value)


def test_no_device_tells_what_failed_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_DISABLE_PLUGINS", "cpu,cpu_reference,tpu,cuda,rocm,gaudi,ascend,spyre")
    plugins = Plugins()
    plugins.load()
    with pytest.raises(PluginError, match=r"broken_import: .*library_that_is_not_installed"):
        plugins.select("auto")


def test_auto_goes_past_a_backend_that_failed_to_load_and_says_so(installed: Plugins) -> None:
    installed_specs = {s.name: s for s in installed.specs()}
    selection = installed.select("auto")
    assert installed_specs[selection.spec.name].auto_rank is not None
    assert re.search(r"not loaded: .*broken_import.* \(core doctor says why\)", selection.reason)


def test_a_probe_that_raises_is_passed_over_by_auto_and_raised_by_name(host: Plugins) -> None:
    host.register_backend(probing("bad", 9, RuntimeError("driver too old")), "bad")
    host.register_backend(probing("good", 1, device("good")), "good")
    selection = host.select("auto")
    assert selection.spec.name == "good"
    assert "core_probe of backend 'bad' raised RuntimeError: driver too old" in selection.reason
    with pytest.raises(PluginError, match="driver too old") as caught:
        host.select("bad")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_named_backend_without_a_device_is_an_error_with_reason_and_remedy(host: Plugins) -> None:
    host.register_backend(probing("b", 1, NONE), "b")
    with pytest.raises(PluginError, match="backend 'b' has no device: no driver is loaded; load it"):
        host.select("b")
    assert host.probe("b") == NONE


@pytest.mark.parametrize("found", [[], "gpu"])
def test_a_probe_gives_devices_or_a_reason(host: Plugins, found: object) -> None:
    host.register_backend(probing("b", 1, found), "b")
    with pytest.raises(PluginError, match="in place of devices or Unavailable"):
        host.probe("b")


def test_the_users_indices_reach_the_probe(host: Plugins) -> None:
    host.register_backend(backend("b"), "b")
    assert [d.index for d in host.select("b", ProbeRequest(visible=(2, 5))).devices] == [2, 5]


# Calls


@pytest.mark.parametrize("reverse", [False, True])
def test_hooks_go_to_the_chosen_backend_alone_in_any_order_of_registration(
    host: Plugins, reverse: bool
) -> None:
    names = ["a", "b", "c"]
    for name in reversed(names) if reverse else names:
        host.register_backend(backend(name), name)
    for name in names:
        handle = host.backend(name)
        opened = handle.open_device(DeviceRequest(index=3))
        assert (opened.info.backend, opened.info.index) == (name, 3)


def test_two_backends_serve_one_process_side_by_side(host: Plugins) -> None:
    handles = [host.register_backend(backend(name), name) for name in ("a", "b")]
    devices = [handle.open_device(DeviceRequest()) for handle in handles]
    allocators = [
        handle.memory_allocator(AllocatorRequest(device=device))
        for handle, device in zip(handles, devices, strict=True)
    ]
    for count, allocator in enumerate(allocators, 1):
        for n in range(count):
            array = np.zeros((4, 4), np.float32)
            allocator.pack(PackRequest(array=array, uses=("linear",), dtype="float32", name=str(n)))
    assert [allocator.used_bytes() for allocator in allocators] == [64, 128]
    devices[0].close()
    devices[1].synchronize()


def test_a_handle_has_every_hook_of_its_backend(host: Plugins) -> None:
    handle: BackendHandle = host.register_backend(backend("b"), "b")
    opened = handle.open_device(DeviceRequest(options={"vocab": "9"}))
    assert isinstance(opened, NullDevice) and opened.vocab == 9
    assert handle.spec.name == handle.name == "b"
    assert handle.probe() == host.probe("b")
    assert handle.ops(OpsRequest(device=opened, dtype="float32"))
    assert handle.sampler(SamplerRequest(device=opened, vocab_size=9))
    request = CommunicatorRequest(device=opened, group="tp", rank=1, world_size=2, rendezvous="")
    assert (handle.communicator(request).rank, handle.communicator(request).world_size) == (1, 2)
    assert handle.conformance(ConformanceRequest(version=(0, 1))) == ConformanceExtras()
    override = OverrideRequest(device=opened, family="f", config=None, params=None)
    assert handle.model_override(override) is None
    assert handle.attention_kernels(kernel_request(opened)) == ()


def test_absent_optional_hooks_have_their_documented_meaning(host: Plugins) -> None:
    lean = without(backend("b", device_sampler=False, max_world_size=1), "core_sampler", "core_communicator")
    handle = host.register_backend(lean, "b")
    assert handle.sampler(SamplerRequest(device=None, vocab_size=1)) is None
    request = CommunicatorRequest(device=None, group="tp", rank=0, world_size=2, rendezvous="")
    with pytest.raises(PluginError, match="'b' does not implement the hook core_communicator"):
        handle.communicator(request)


@pytest.mark.parametrize("hook", ["core_open_device", "core_memory_allocator", "core_ops", "core_compile"])
def test_none_from_a_hook_that_must_answer_is_an_error_with_its_name(host: Plugins, hook: str) -> None:
    silent: Any = {hook: lambda self, request: None}
    handle = host.register_backend(with_methods(NullBackend, replace(SPEC, name="b"), **silent), "b")
    with pytest.raises(PluginError, match=f"{hook} of backend 'b' returned None"):
        getattr(handle, hook.removeprefix("core_"))(None)


def test_an_error_of_a_factory_hook_arrives_as_it_is(host: Plugins) -> None:
    def core_open_device(self: NullBackend, request: DeviceRequest) -> NullDevice:
        raise ZeroDivisionError("the driver's own")

    plugin = with_methods(NullBackend, replace(SPEC, name="b"), core_open_device=core_open_device)
    with pytest.raises(ZeroDivisionError, match="the driver's own"):
        host.register_backend(plugin, "b").open_device(DeviceRequest())


def kernel_request(device: object) -> AttentionKernelRequest:
    layer = CacheLayerSpec(kind="paged", dtype="float32", num_kv_heads=1, head_size=8, v_head_size=8)
    attention = AttentionSpec(scale=1.0, num_heads=1, num_kv_heads=1, head_size=8, v_head_size=8)
    return AttentionKernelRequest(device=device, dtype="float32", layer=layer, attention=attention)


def offering(base: type, kernel: object, *args: Any) -> Any:
    return with_methods(base, *args, core_attention_kernel=lambda self, request: kernel)


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_are_offered_by_the_backend_and_by_addons_but_by_no_other_backend(
    host: Plugins, reverse: bool
) -> None:
    own, foreign, first, second = (object() for _ in range(4))
    steps: list[Callable[[], Any]] = [
        lambda: host.register_backend(offering(NullBackend, own, replace(SPEC, name="own")), "own"),
        lambda: host.register_backend(offering(NullBackend, foreign, replace(SPEC, name="other")), "other"),
        lambda: host.register_addon(offering(Addon, second), "z_addon"),
        lambda: host.register_addon(offering(Addon, first), "a_addon"),
        lambda: host.register_addon(offering(Addon, None), "m_addon"),
    ]
    for step in reversed(steps) if reverse else steps:
        step()
    offers: tuple[tuple[str, AttentionKernel], ...] = host.attention_kernels("own", kernel_request(None))
    assert offers == (("own", own), ("a_addon", first), ("z_addon", second))


@pytest.mark.parametrize("reverse", [False, True])
def test_observers_of_all_plugins_come_by_name(host: Plugins, reverse: bool) -> None:
    def observing(base: type, name: str, *args: Any) -> Any:
        return with_methods(base, *args, core_observer=lambda self, request: [name, request.engine])

    steps: list[Callable[[], Any]] = [
        lambda: host.register_addon(observing(Addon, "z"), "z"),
        lambda: host.register_addon(observing(Addon, "a"), "a"),
        lambda: host.register_backend(observing(NullBackend, "m", replace(SPEC, name="m")), "m"),
        lambda: host.register_backend(backend("b"), "b"),
    ]
    for step in reversed(steps) if reverse else steps:
        step()
    observers: tuple[Observer, ...] = host.observers(ObserverRequest(engine="e"))
    assert observers == ("a", "e", "m", "e", "z", "e")


def test_every_plugin_may_add_commands_and_a_broken_one_stops_no_other(
    host: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    def add(name: str) -> Any:
        def core_cli(self: Addon, request: CliRequest) -> None:
            request.app.command(name)(lambda: None)

        return with_methods(Addon, core_cli=core_cli)

    def broken(self: Addon, request: CliRequest) -> None:
        raise KeyError("settings")

    host.register_addon(with_methods(Addon, core_cli=broken), "a_broken")
    host.register_addon(add("second"), "c")
    host.register_addon(add("first"), "b")
    app = typer.Typer()
    host.cli(app)
    assert [command.name for command in app.registered_commands] == ["first", "second"]
    (failure,) = host.failures
    assert failure.name == "a_broken" and "core_cli of plugin 'a_broken' raised KeyError" in failure.reason
    assert failure.reason in caplog.text


# Tracing


def test_tracing_logs_each_call_with_plugin_hook_outcome_and_duration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plugins = Plugins(disabled=frozenset(), trace=True)
    handle = plugins.register_backend(backend("b"), "b")
    with caplog.at_level(logging.DEBUG, "core.plugins"):
        caplog.clear()
        handle.open_device(DeviceRequest())
        with pytest.raises(Exception, match="no option"):
            handle.open_device(DeviceRequest(options={"nope": "1"}))
    returned, raised = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"core_open_device of b returned after \d+\.\d{3} ms", returned)
    assert re.fullmatch(r"core_open_device of b raised after \d+\.\d{3} ms", raised)


@pytest.mark.parametrize(("level", "traced"), [("1", False), ("2", True)])
def test_the_debug_level_decides_on_tracing_to_stderr(level: str, traced: bool) -> None:
    script = "from core.plugins import Plugins\np = Plugins()\np.load()\np.select('null')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CORE_DEBUG": level},
    )
    assert ("core_probe of null returned after" in done.stderr) is traced
    assert done.stdout == ""
