"""Collectives through gloo. Each group has a store and a process group of its own, never a default one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from core.contract.errors import ConfigError, DeviceError
from core.contract.requests import CommunicatorRequest

LOOPBACK = ("localhost", "127.0.0.1")


class GlooCommunicator:
    """See `core.contract.interfaces.Communicator`.

    Sums of bfloat16 and float16 travel and add up in float32. Arrays of 0 elements are not sent: every member
    sees the same shape, so every member skips (`all_to_all`, whose members differ, always takes part).

    Raises:
        ConfigError: `rendezvous` is not tcp://HOST:PORT.
        DeviceError: the members did not meet, or a collective failed or timed out.
    """

    def __init__(self, request: CommunicatorRequest) -> None:
        self.rank, self.world_size = request.rank, request.world_size
        self._what = f"group {request.group!r}, rank {request.rank} of {request.world_size}"
        address = urlsplit(request.rendezvous)
        if address.scheme != "tcp" or not address.hostname or address.port is None:
            raise ConfigError(
                f"rendezvous is {request.rendezvous!r}; give tcp://HOST:PORT of the first member"
            )
        timeout = timedelta(seconds=request.timeout_s)
        self._group: dist.ProcessGroupGloo | None = self._guard(
            f"meeting at {request.rendezvous}",
            lambda: _join(request, str(address.hostname), int(address.port or 0), timeout),
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See the protocol."""
        wide = _summable(x)
        if wide.numel():
            self._run("all_reduce", lambda group: group.allreduce([wide]))
        return wide.to(x.dtype)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See the protocol; members' shapes are equal."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        if x.numel():
            self._run("all_gather", lambda group: group.allgather([[_bytes(p) for p in parts]], [_bytes(x)]))
        return torch.cat(parts, dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See the protocol. Members exchange parts and add them in rank order.

        Raises:
            ConfigError: the dimension is no multiple of the number of members.
        """
        if x.shape[dim] % self.world_size:
            raise ConfigError(
                f"reduce_scatter of shape {tuple(x.shape)} along dimension {dim} over {self.world_size} "
                "members: pad the dimension to a multiple of them"
            )
        wide = _summable(torch.stack(x.chunk(self.world_size, dim)))  # [world_size, ...]
        received = torch.empty_like(wide)
        if wide.numel():
            self._run("reduce_scatter", lambda group: group.alltoall_base(received, wide, [], []))
        return received.sum(0, dtype=wide.dtype).to(x.dtype)

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """See the protocol.

        Raises:
            ConfigError: the counts do not fit the array or the group.
        """
        if len(send) != self.world_size or len(receive) != self.world_size or sum(send) != x.shape[0]:
            raise ConfigError(
                f"all_to_all of {x.shape[0]} rows over {self.world_size} members got send={list(send)} and "
                f"receive={list(receive)}: one count per member, send adding up to the rows"
            )
        out = x.new_empty((sum(receive), *x.shape[1:]))
        row = x[:0].new_empty((1, *x.shape[1:])).nbytes
        if row:
            rows_out, rows_in = _bytes(out).view(-1, row), _bytes(x.contiguous()).view(-1, row)
            self._run(
                "all_to_all",
                lambda group: group.alltoall_base(rows_out, rows_in, list(receive), list(send)),
            )
        return out

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """See the protocol."""
        out = x.clone(memory_format=torch.contiguous_format)
        if out.numel():
            self._run("broadcast", lambda group: group.broadcast(_bytes(out), source))
        return out

    def send(self, x: torch.Tensor, to: int) -> None:
        """See the protocol. Returns when the array may be changed again."""
        if x.numel():
            data = _bytes(x.contiguous())
            self._run("send", lambda group: group.send([data], to, 0))

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """See the protocol."""
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if out.numel():
            self._run("receive", lambda group: group.recv([_bytes(out)], source, 0))
        return out

    def barrier(self) -> None:
        """See the protocol."""
        self._run("barrier", lambda group: group.barrier())

    def close(self) -> None:
        """See the protocol."""
        self._group = None

    def _run(self, name: str, start: Callable[[Any], Any]) -> None:
        group = self._group
        if group is None:
            raise DeviceError(f"{name} on {self._what}: the group is closed; make a new communicator")
        self._guard(name, lambda: start(group).wait())

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # gloo and the store know no other type
            raise DeviceError(
                f"{name} failed on {self._what}: {error}; see the other members' logs for the first failure"
            ) from error


def _join(request: CommunicatorRequest, host: str, port: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    first = request.rank == 0
    # Several groups of a process may meet at one address; the prefix keeps them apart.
    store = dist.TCPStore(
        host, port, request.world_size, first, timeout, wait_for_workers=False, multi_tenant=True
    )
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    if host in LOOPBACK:  # a host's own name may lead nowhere
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    else:
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
    named = dist.PrefixStore(request.group, store)
    return dist.ProcessGroupGloo(named, request.rank, request.world_size, options)


def _summable(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in a dtype that adds up without loss: small floats in float32, integers in int64."""
    if x.dtype in (torch.float32, torch.float64):
        wide = x.dtype
    else:
        wide = torch.float32 if x.dtype.is_floating_point else torch.int64
    return x.to(wide, copy=True, memory_format=torch.contiguous_format)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous array as uint8 [num_bytes]: gloo does not know every dtype."""
    return x.reshape(-1).view(torch.uint8)
