"""Collectives of the CPU backend between three processes: values, any size, any dtype.

Run as a program, this file is one member; the fixture starts all once and every test reads its own result.
Three, because a sum of two terms is rounded once in any accumulator.
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

WORLD = 3
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)


def member_value(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that differ in every element and between members; small enough to be exact in every dtype."""
    size = torch.Size(shape).numel()
    return ((torch.arange(size) * 3 + rank * 7 + 1) % 31).to(dtype).reshape(shape)


def total(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The sum of the members' values."""
    return torch.stack([member_value(r, *shape, dtype=dtype) for r in range(WORLD)]).sum(0).to(dtype)


def all_reduce_sums_every_dtype_and_keeps_it(comm: Communicator) -> None:
    for dtype in DTYPES[:-1]:
        out = comm.all_reduce(member_value(comm.rank, 3, 5, dtype=dtype))
        assert out.dtype == dtype
        assert torch.equal(out, total(3, 5, dtype=dtype)), dtype


def sums_of_bfloat16_are_rounded_once(comm: Communicator) -> None:
    # 256 + 1 + 1 is 258, which bfloat16 holds, but 256 + 1 is 256 in it. Whatever the order of the sum, some
    # element meets its 256 first.
    x = torch.ones(WORLD, 21, WORLD, dtype=torch.bfloat16)
    x[:, :, comm.rank] = 256
    assert comm.all_reduce(x).eq(256 + WORLD - 1).all()
    assert comm.reduce_scatter(x, 0).eq(256 + WORLD - 1).all()


def reductions_leave_strided_input_alone(comm: Communicator) -> None:
    whole = member_value(comm.rank, 4, 6)
    kept = whole.clone()
    out = comm.all_reduce(whole[:, 1:4])
    assert torch.equal(out, total(4, 6)[:, 1:4])
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
            out = comm.reduce_scatter(member_value(comm.rank, 3, 6, dtype=dtype), dim)
            assert torch.equal(out, total(3, 6, dtype=dtype).chunk(WORLD, dim)[comm.rank]), (dtype, dim)


def reduce_scatter_refuses_a_part_that_is_not_equal(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="pad the dimension"):
        comm.reduce_scatter(torch.zeros(4), 0)


def all_to_all_moves_unequal_rows(comm: Communicator) -> None:
    send = ((1, 3, 2), (0, 2, 4), (5, 0, 1))
    mine = comm.rank
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        receive = [send[r][mine] for r in range(WORLD)]
        out = comm.all_to_all(member_value(mine, sum(send[mine]), 5, dtype=dtype), send[mine], receive)
        sent = [member_value(r, sum(send[r]), 5, dtype=dtype).split(list(send[r])) for r in range(WORLD)]
        assert torch.equal(out, torch.cat([parts[mine] for parts in sent])), dtype


def all_to_all_accepts_members_with_no_rows(comm: Communicator) -> None:
    send = [0, 2, 0] if comm.rank == 0 else [0, 0, 0]
    receive = [2, 0, 0] if comm.rank == 1 else [0, 0, 0]
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
                comm.send(value, WORLD - 1)
        elif comm.rank == WORLD - 1:
            for value in values:
                assert torch.equal(comm.receive(torch.empty_like(value), 0), value), dtype


def zero_elements_pass_every_collective(comm: Communicator) -> None:
    empty = torch.zeros(0, 4)
    assert comm.all_reduce(empty).shape == (0, 4)
    assert comm.all_gather(empty, 0).shape == (0, 4)
    assert comm.all_gather(empty, 1).shape == (0, 4 * WORLD)
    assert comm.reduce_scatter(empty, 0).shape == (0, 4)
    assert comm.all_to_all(empty, [0] * WORLD, [0] * WORLD).shape == (0, 4)
    assert comm.broadcast(empty, 1).shape == (0, 4)
    if comm.rank == 0:
        comm.send(empty, 1)
    elif comm.rank == 1:
        assert comm.receive(empty, 0).shape == (0, 4)


def odd_sizes_are_exact(comm: Communicator) -> None:
    for size in (1, 3, 127, 4097):
        out = comm.all_reduce(member_value(comm.rank, size))
        assert torch.equal(out, total(size)), size


def results_of_inference_mode_can_be_sent(comm: Communicator) -> None:
    with torch.inference_mode():
        x = member_value(comm.rank, 8) * 2
        assert torch.equal(comm.all_reduce(x), total(8) * 2)
        assert torch.equal(comm.broadcast(x, 1), member_value(1, 8) * 2)


def barrier_returns(comm: Communicator) -> None:
    comm.barrier()


CHECKS: tuple[Callable[[Communicator], None], ...] = (
    all_reduce_sums_every_dtype_and_keeps_it,
    sums_of_bfloat16_are_rounded_once,
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


def request(
    rank: int, world_size: int, port: int, timeout_s: float, group: str = "tp"
) -> CommunicatorRequest:
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
def test_members_agree_that(check: str, results: Mapping[str, str]) -> None:
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
