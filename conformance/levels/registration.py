"""L0: the backend loads without side effects, says what it is, finds its devices, keeps to the contract."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from conformance.check import Check, Context
from conformance.execution import EXECUTIONS
from core.contract import CONTRACT
from core.contract.interfaces import Communicator
from core.contract.requests import ProbeRequest, SpecRequest
from core.contract.spec import BackendSpec
from core.contract.types import DeviceInfo, Unavailable

ALLOWED = ("core.contract",)
"""Of core, what a plugin may import."""
KNOWN_DTYPES = ("float64", "float32", "bfloat16", "float16")
_FRAMEWORKS = ("torch", "jax", "jaxlib", "tensorflow", "triton")

# Runs in a process of its own: what changes there when the plugin is imported and its spec is read.
_SIDE_EFFECTS = """
import json, os, signal, socket, sys, threading
def handlers():
    own = set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}
    return {int(s): repr(signal.getsignal(s)) for s in own}
calls = []
def refuse(self, *a):
    calls.append(str(a)); raise OSError("no network while a plugin is imported")
socket.socket.connect = refuse
from importlib import import_module
from core.contract.requests import SpecRequest
import core.plugins
before = handlers(), dict(os.environ), os.getcwd(), threading.active_count(), set(sys.modules)
found = import_module(sys.argv[1])
for part in filter(None, sys.argv[2].split(".")):
    found = getattr(found, part)
found.core_backend_spec(SpecRequest(contract=tuple(json.loads(sys.argv[3]))))
wrong = []
if handlers() != before[0]: wrong.append("changes signal handlers")
if dict(os.environ) != before[1]: wrong.append("changes the environment")
if os.getcwd() != before[2]: wrong.append("changes the working directory")
if threading.active_count() != before[3]: wrong.append("starts threads")
if calls: wrong.append("opens connections to " + ", ".join(calls))
new = {m.partition(".")[0] for m in set(sys.modules) - before[4]}
heavy = sorted(new & set(json.loads(sys.argv[4])))
if heavy: wrong.append("imports " + ", ".join(heavy))
print(json.dumps(wrong))
"""


def loads(context: Context) -> None:
    spec = context.spec
    again = context.subject.plugin.core_backend_spec(SpecRequest(contract=CONTRACT))
    context.require(again == spec, "core_backend_spec gives another spec when it is called again")
    context.require(hash(again) == hash(spec), "the spec cannot be hashed, or not twice alike")
    context.record("contract", f"{spec.contract[0]}.{spec.contract[1]}")


def no_side_effects(context: Context) -> None:
    module, _, attribute = context.subject.place.partition(":")
    arguments = [module, attribute, json.dumps(CONTRACT), json.dumps(_FRAMEWORKS)]
    done = subprocess.run(
        [sys.executable, "-c", _SIDE_EFFECTS, *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    context.require(done.returncode == 0, f"importing {module} alone fails: {done.stderr.strip()[-300:]}")
    wrong = json.loads(done.stdout.strip().splitlines()[-1])
    what = f"importing {module} and reading its spec {' and '.join(wrong)}; do that when a device is opened"
    context.require(not wrong, what)


def spec_is_consistent(context: Context) -> None:
    spec = context.spec
    wrong = []
    if spec.name != spec.name.lower() or not spec.name.replace("_", "").isalnum():
        wrong.append(f"name {spec.name!r} is not lower case letters, digits and _")
    wrong += [f"dtype {d!r} is not one of {KNOWN_DTYPES}" for d in spec.dtypes if d not in KNOWN_DTYPES]
    if not spec.dtypes:
        wrong.append("dtypes is empty")
    for name, values in (
        ("cache.block_sizes", spec.cache.block_sizes),
        ("attention.head_sizes", spec.attention.head_sizes),
        ("shapes.token_buckets", spec.shapes.token_buckets),
        ("shapes.request_buckets", spec.shapes.request_buckets),
        ("shapes.width_buckets", spec.shapes.width_buckets),
    ):
        if any(v < 1 for v in values) or len(set(values)) != len(values):
            wrong.append(f"{name} is {values}; positive and distinct values are wanted")
        if name.startswith("shapes") and list(values) != sorted(values):
            wrong.append(f"{name} is {values}; ascending values are wanted")
    if not spec.cache.block_sizes:
        wrong.append("cache.block_sizes is empty")
    methods = {n for n in vars(Communicator) if not n.startswith("_")} - {"rank", "world_size", "close"}
    wrong += [
        f"collective {c!r} is not one of {sorted(methods)}" for c in spec.collectives if c not in methods
    ]
    if spec.max_world_size > 1 and not {"all_reduce", "all_gather"} <= set(spec.collectives):
        wrong.append("max_world_size is over 1, but all_reduce and all_gather are not both in collectives")
    counts = ("prefill_multiple", "min_decode_rows", "max_prefills", "max_tokens", "max_requests")
    wrong += [f"batch.{n} is {v}" for n in counts if (v := getattr(spec.batch, n)) is not None and v < 1]
    if spec.overlap < 1 or spec.max_world_size < 1:
        wrong.append("overlap and max_world_size must be at least 1")
    context.require(not wrong, f"the spec contradicts itself: {'; '.join(wrong)}")


def devices(context: Context) -> None:
    found = context.subject.handle.probe(ProbeRequest())
    context.require(not isinstance(found, Unavailable), f"no device: {getattr(found, 'reason', '')}")
    assert not isinstance(found, Unavailable)
    context.record("devices", len(found))
    indices = [info.index for info in found]
    context.require(
        len(set(indices)) == len(indices), f"devices have the indices {indices}; distinct ones are wanted"
    )
    for info in found:
        context.require(
            isinstance(info, DeviceInfo), f"the probe gives a {type(info).__name__}, not DeviceInfo"
        )
        context.require(
            info.backend == context.spec.name, f"a device says that its backend is {info.backend!r}"
        )
        context.require(bool(info.name), "a device has no name")
        context.require(
            info.execution in EXECUTIONS,
            f"device {info.name!r} has execution {info.execution!r}, but wanted is one of "
            + ", ".join(EXECUTIONS),
        )


def one_device(context: Context) -> None:
    index = context.subject.info.index
    found = context.subject.handle.probe(ProbeRequest(visible=(index,)))
    context.require(not isinstance(found, Unavailable), f"device {index} alone is not found")
    assert not isinstance(found, Unavailable)
    context.require([i.index for i in found] == [index], f"of device {index} alone, {len(found)} are found")


def no_device(context: Context) -> None:
    for visible in ((), (10_000,)):
        found = context.subject.handle.probe(ProbeRequest(visible=visible))
        context.require(
            isinstance(found, Unavailable),
            f"with visible={visible} the probe gives {found!r}; Unavailable is wanted",
        )
        assert isinstance(found, Unavailable)
        context.require(bool(found.reason.strip()), f"with visible={visible} Unavailable has no reason")


def memory_is_told(context: Context) -> None:
    info, memory = context.subject.device.info, context.subject.device.memory()
    context.require(
        0 < memory.free_bytes <= memory.total_bytes,
        f"{memory.free_bytes} bytes of {memory.total_bytes} are free",
    )
    context.require(
        info.memory_bytes is None or memory.total_bytes <= info.memory_bytes or memory.kind == "measured",
        f"the device declares {memory.total_bytes} bytes, the probe {info.memory_bytes}",
    )
    buffer = context.subject.device.host_buffer(7)
    context.require(buffer.shape == (7,) and buffer.dtype == "int32", f"host_buffer(7) gives {buffer!r}")
    context.require(not buffer.any(), "a host buffer is not zeroed")


def imports_the_contract_alone(context: Context) -> None:
    """Whatever the plugin's package imports of core is `core.contract`."""
    module = import_module(context.subject.place.partition(":")[0])
    file = Path(module.__file__ or "")
    package = file.parent if module.__package__ else file
    wrong = []
    for source in sorted(package.rglob("*.py")) if package.is_dir() else [file]:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = (
                    [node.module] if node.module != "core" else [f"core.{alias.name}" for alias in node.names]
                )
            for name in names:
                is_core = name == "core" or name.startswith("core.")
                if is_core and not any(name == a or name.startswith(a + ".") for a in ALLOWED):
                    wrong.append(f"{source.name}:{getattr(node, 'lineno', 0)} imports {name}")
    context.require(
        not wrong,
        f"{'; '.join(wrong[:5])}: a plugin may import core.contract alone, which alone is kept stable",
    )


def inherited(context: Context) -> None:
    """Plain ops have no composite: a table that lacks one lacks it."""
    from core.contract.ops import PLAIN_OPS, inherited_ops
    from core.contract.requests import OpsRequest

    table = context.subject.handle.ops(OpsRequest(device=context.subject.device, dtype=context.dtype))
    optional = {
        "attend_latent": context.spec.attention.latent,
        "short_conv": bool(context.spec.state_kinds),
        "state_scan": bool(context.spec.state_kinds),
        "route": context.spec.routed_experts,
        "experts": context.spec.routed_experts,
    }
    lacking = {op for op in inherited_ops(table) if op in PLAIN_OPS and optional.get(op, True)}
    context.require(not lacking, f"the op table lacks {', '.join(sorted(lacking))}; implement them")
    context.record("composites", len(inherited_ops(table)))


ABOUT = {
    loads: "the backend loads for this contract, and its spec is the same whenever it is read",
    no_side_effects: "importing the plugin and reading its spec starts nothing and imports no framework",
    spec_is_consistent: "what the spec declares is not contradictory",
    devices: "the probe names each device once",
    one_device: "the probe heeds which devices the user allows",
    no_device: "without a device the probe says so, and why",
    memory_is_told: "the device tells its memory, and gives host buffers",
    imports_the_contract_alone: "the plugin's package imports nothing of core but the contract",
    inherited: "the op table has every op that the spec implies",
}


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for run, about in ABOUT.items():
        yield Check(f"L0/registration/{run.__name__.replace('_', '-')}", run, about, is_waivable=False)
