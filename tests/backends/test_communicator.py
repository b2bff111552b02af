"""Collectives of the CPU backend between two processes: values, any size, any dtype.

Run as a program, this file is one member; the fixture starts both once and every test reads its own result.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from backends.cpu import plugin
from core.contract.errors import ConfigError, DeviceError
from core.contract.interfaces import Communicator
from core.contract.requests import CommunicatorRequest

WORLD = 2
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)


def member_value(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that differ in every element and between members; small enough to be exact in every dtype."""
    size = torch.Size(shape).numel()
    return ((torch.arange(size) * 3 + rank * 7 + 1) % 31).to(dtype).reshape(shape)


def all_reduce_sums_every_dtype_and_keeps_it(comm: Communicator) -> None:
    for dtype in DTYPES[:-1]:
        out = comm.all_reduce(member_value(comm.rank, 3, 5, dtype=dtype))
        wanted = member_value(0, 3, 5, dtype=dtype) + member_value(1, 3, 5, dtype=dtype)
        assert out.dtype == dtype
        assert torch.equal(out, wanted), dtype


def all_reduce_adds_bfloat16_in_float32(comm: Communicator) -> None:
    # 256 + 1 + ... is lost in bfloat16 at each addition; of three terms in float32 only the result is rounded.
    x = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)[comm.rank]
    for _ in range(1):
        assert comm.all_reduce(x.reshape(1)).float().item() == torch.tensor(257.0).bfloat16().float().item()


def reductions_leave_strided_input_alone(comm: Communicator) -> None:
    whole = member_value(comm.rank, 4, 6)
    kept = whole.clone()
    out = comm.all_reduce(whole[:, 1:4])
    assert torch.equal(out, member_value(0, 4, 6)[:, 1:4] + member_value(1, 4, 6)[:, 1:4])
    assert torch.equal(whole, kept)


def all_gather_joins_in_rank_order_along_any_dimension(comm: Communicator) -> None:
    for dtype in DTYPES:
        for dim in (0, 1, -1):
            out = comm.all_gather(member_value(comm.rank, 2, 3, 4, dtype=dtype), dim)
            wanted = torch.cat([member_value(r, 2, 3, 4, dtype=dtype) for r in range(WORLD)], dim)
            assert out.dtype == dtype
            assert torch.equal(out, wanted), (dtype, dim)


def reduce_scatter_gives_each_member_its_part(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for dim in (0, 1):
            out = comm.reduce_scatter(member_value(comm.rank, 4, 6, dtype=dtype), dim)
            total = member_value(0, 4, 6, dtype=dtype) + member_value(1, 4, 6, dtype=dtype)
            assert torch.equal(out, total.chunk(WORLD, dim)[comm.rank]), (dtype, dim)


def reduce_scatter_refuses_a_part_that_is_not_equal(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="pad the dimension"):
        comm.reduce_scatter(torch.zeros(3), 0)


def all_to_all_moves_unequal_rows(comm: Communicator) -> None:
    send = ((1, 3), (0, 2))
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        mine, other = comm.rank, 1 - comm.rank
        receive = [send[r][mine] for r in range(WORLD)]
        out = comm.all_to_all(member_value(mine, sum(send[mine]), 5, dtype=dtype), send[mine], receive)
        parts = [member_value(r, sum(send[r]), 5, dtype=dtype).split(list(send[r]))[mine] for r in range(WORLD)]
        assert torch.equal(out, torch.cat(parts)), (dtype, other)


def all_to_all_accepts_members_with_no_rows(comm: Communicator) -> None:
    send = [0, 2] if comm.rank == 0 else [0, 0]
    receive = [0, 0] if comm.rank == 0 else [2, 0]
    out = comm.all_to_all(member_value(comm.rank, sum(send), 3), send, receive)
    assert torch.equal(out, member_value(0, 2, 3) if comm.rank == 1 else torch.zeros(0, 3))


def broadcast_gives_the_source_value(comm: Communicator) -> None:
    for source in range(WORLD):
        for dtype in DTYPES:
            out = comm.broadcast(member_value(comm.rank, 7, dtype=dtype), source)
            assert torch.equal(out, member_value(source, 7, dtype=dtype)), (dtype, source)


def send_reaches_receive_in_order(comm: Communicator) -> None:
    for dtype in DTYPES:
        values = [member_value(i, 3, 2, dtype=dtype) for i in range(3)]
        if comm.rank == 0:
            for value in values:
                comm.send(value, 1)
        else:
            for value in values:
                assert torch.equal(comm.receive(torch.empty_like(value), 0), value), dtype


def zero_elements_pass_every_collective(comm: Communicator) -> None:
    empty = torch.zeros(0, 4)
    assert comm.all_reduce(empty).shape == (0, 4)
    assert comm.all_gather(empty, 0).shape == (0, 4)
    assert comm.all_gather(empty, 1).shape == (0, 8)
    assert comm.reduce_scatter(empty, 1).shape == (0, 2)
    assert comm.all_to_all(empty, [0, 0], [0, 0]).shape == (0, 4)
    assert comm.broadcast(empty, 1).shape == (0, 4)
    if comm.rank == 0:
        comm.send(empty, 1)
    else:
        assert comm.receive(empty, 0).shape == (0, 4)


def odd_sizes_are_exact(comm: Communicator) -> None:
    for size in (1, 3, 127, 4097):
        out = comm.all_reduce(member_value(comm.rank, size))
        assert torch.equal(out, member_value(0, size) + member_value(1, size)), size


def results_of_inference_mode_can_be_sent(comm: Communicator) -> None:
    with torch.inference_mode():
        x = member_value(comm.rank, 8) * 2
        assert torch.equal(comm.all_reduce(x), (member_value(0, 8) + member_value(1, 8)) * 2)
        assert torch.equal(comm.broadcast(x, 1), member_value(1, 8) * 2)


def barrier_returns(comm: Communicator) -> None:
    comm.barrier()


CHECKS: tuple[Callable[[Communicator], None], ...] = (
    all_reduce_sums_every_dtype_and_keeps_it,
    all_reduce_adds_bfloat16_in_float32,
    reductions_leave_strided_input_alone,
    all_gather_joins_in_rank_order_along_any_dimension,
    reduce_scatter_gives_each_member_its_part,
    reduce_scatter_refuses_a_part_that_is_not_equal,
    all_to_all_moves_unequal_rows,
    all_to_all_accepts_members_with_no_rows,
    broadcast_gives_the_source_value,
    send_reaches_receive_in_order,
    zero_elements_pass_every_collective,
    odd_sizes_are_exact,
    results_of_inference_mode_can_be_sent,
    barrier_returns,
)


def request(rank: int, world_size: int, port: int, timeout_s: float, group: str = "tp") -> CommunicatorRequest:
    return CommunicatorRequest(
        device=None,
        group=group,
        rank=rank,
        world_size=world_size,
        rendezvous=f"tcp://127.0.0.1:{port}",
        timeout_s=timeout_s,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def member(rank: int, port: int) -> dict[str, str]:
    """Run every check as one member: name -> what failed, "" = nothing.

    Both groups meet at one address, so the second proves that groups of a process are apart.
    """
    groups = [plugin.core_communicator(request(rank, WORLD, port, 30.0, name)) for name in ("tp", "pp")]
    results = {}
    for i, check in enumerate(CHECKS):
        try:
            check(groups[i % len(groups)])
            results[check.__name__] = ""
        except Exception as error:
            results[check.__name__] = f"rank {rank}: {type(error).__name__}: {error}"
    for comm in groups:
        comm.close()
        comm.close()
    return results


@pytest.fixture(scope="module")
def results() -> Mapping[str, str]:
    port = free_port()
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    found = {check.__name__: "" for check in CHECKS}
    for process in members:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        for name, failure in json.loads(out.splitlines()[-1]).items():
            found[name] += failure
    return found


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_members_agree_that(check: str, results: Mapping[str, str]) -> None:
    assert results[check] == ""


def test_a_group_of_one_gives_its_input_back() -> None:
    comm = plugin.core_communicator(request(0, 1, free_port(), 10.0))
    x = member_value(0, 2, 2)
    assert torch.equal(comm.all_reduce(x), x)
    assert torch.equal(comm.all_gather(x, 0), x)
    assert torch.equal(comm.reduce_scatter(x, 0), x)
    assert torch.equal(comm.all_to_all(x, [2], [2]), x)
    comm.close()


def test_a_member_that_does_not_come_is_a_device_error_that_names_the_group() -> None:
    with pytest.raises(DeviceError, match=r"group 'tp', rank 0 of 2"):
        plugin.core_communicator(request(0, 2, free_port(), 1.0))


def test_a_closed_group_refuses_work() -> None:
    comm = plugin.core_communicator(request(0, 1, free_port(), 10.0))
    comm.close()
    with pytest.raises(DeviceError, match="closed"):
        comm.all_reduce(torch.ones(1))


def test_a_rendezvous_that_is_no_address_is_refused_with_the_form_wanted() -> None:
    bad = CommunicatorRequest(device=None, group="tp", rank=0, world_size=2, rendezvous="here")
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        plugin.core_communicator(bad)


if __name__ == "__main__":
    print(json.dumps(member(int(sys.argv[1]), int(sys.argv[2]))))
