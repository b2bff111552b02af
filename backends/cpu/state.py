"""Ops over state slots: the short convolution and the gated delta rule.

A row's state is read from `read` (-1 = zeros), advanced over its tokens, and stored in `write`; where a
checkpoint is asked, the state after that many tokens is stored too. All reads come before all writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from backends.cpu.allocator import Cache
from backends.cpu.attention import host_rows
from backends.cpu.experts import activate
from backends.cpu.rows import StepMemo
from core.contract.batch import Step
from core.contract.opspecs import ConvSpec, ScanSpec

CHUNK = 64
"""Tokens of the delta rule that are solved at once (Yang et al. use 64 too)."""


@dataclass(frozen=True)
class Slots:
    """State slots of the real rows: read, write int64 [R]; fresh bool [R], rows that start from zeros; stored
    int64 [n], the rows with a checkpoint, their offsets and slots.
    """

    read: torch.Tensor
    fresh: torch.Tensor
    write: torch.Tensor
    stored: torch.Tensor
    offset: torch.Tensor
    slot: torch.Tensor

    @staticmethod
    def of(step: Step, group: int, num_rows: int) -> Slots:
        """From the step's state group."""
        state = step.state(group)
        read = state.read[:num_rows].long()
        offset = state.checkpoint_offset[:num_rows].long()
        stored = offset.nonzero()[:, 0]
        slot = state.checkpoint_slot[:num_rows].long()[stored]
        return Slots(read.clamp(min=0), read < 0, state.write[:num_rows].long(), stored, offset[stored], slot)

    def load(self, part: torch.Tensor) -> torch.Tensor:
        """A copy of each row's state: [R, *shape]."""
        state = part[self.read]
        state[self.fresh] = 0
        return state


def _slots(memo: StepMemo, step: Step, group: int) -> Slots:
    num_rows = host_rows(memo, step).num_rows
    slots: Slots = memo.get(step, ("state", group), lambda: Slots.of(step, group, num_rows))
    return slots


@dataclass(frozen=True)
class Taps:
    """Where a convolution reads, as rows of [this step's tokens, then each row's W - 1 older inputs].

    inputs: int64 [num_tokens, W]; after, checkpoint: int64 [R, W - 1] and [n, W - 1], the inputs that are the
    state then.
    """

    inputs: torch.Tensor
    after: torch.Tensor
    checkpoint: torch.Tensor


def _taps(memo: StepMemo, step: Step, slots: Slots, width: int) -> Taps:
    rows = host_rows(memo, step)
    start = torch.tensor(rows.start)
    row = step.row_of_token[: rows.num_tokens].long()
    older = width - 1

    def source(row: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """Inputs [first, first + count) of each row; those before 0 lie in its state."""
        i = first[:, None] + torch.arange(count)
        in_state = rows.num_tokens + row[:, None] * older + older + i
        return torch.where(i >= 0, start[row][:, None] + i, in_state)

    all_rows = torch.arange(rows.num_rows)
    return Taps(
        source(row, torch.arange(rows.num_tokens) - start[row] - older, width),
        source(all_rows, start[1:] - start[:-1] - older, older),
        source(slots.stored, slots.offset - older, older),
    )


def short_conv(
    memo: StepMemo,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    cache: Cache,
    step: Step,
    spec: ConvSpec,
) -> torch.Tensor:
    """See `core.contract.ops.Ops.short_conv`: x [T, C] -> [T, C]."""
    slots = _slots(memo, step, cache.group)
    taps: Taps = memo.get(
        step, ("taps", cache.group, spec.width), lambda: _taps(memo, step, slots, spec.width)
    )
    part = cache.parts["conv"]
    num_tokens = taps.inputs.shape[0]
    older = slots.load(part).transpose(1, 2).reshape(-1, spec.channels)  # [R * (W - 1), C]
    inputs = torch.cat([x[:num_tokens], older.to(x.dtype)])
    y = torch.zeros((num_tokens, spec.channels), dtype=torch.float32)
    for i in range(spec.width):
        y.addcmul_(inputs[taps.inputs[:, i]].float(), w[:, i].float())
    if bias is not None:
        y += bias
    if spec.activation is not None:
        y = activate(y, spec.activation)
    part[slots.write] = inputs[taps.after].transpose(1, 2).to(part.dtype)
    part[slots.slot] = inputs[taps.checkpoint].transpose(1, 2).to(part.dtype)
    return _padded(y, x)


def gated_delta_scan(
    memo: StepMemo,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    cache: Cache,
    step: Step,
    spec: ScanSpec,
) -> torch.Tensor:
    """See `core.contract.ops.Ops.state_scan`: -> [T, N, Hv]. Everything is float32 up to the result."""
    rows, slots = host_rows(memo, step), _slots(memo, step, cache.group)
    n, repeat = rows.num_tokens, spec.num_v_heads // spec.num_k_heads
    x = Inputs(
        _unit(q[:n].float(), spec.l2_norm_eps).mul(spec.scale).repeat_interleave(repeat, 1),
        _unit(k[:n].float(), spec.l2_norm_eps).repeat_interleave(repeat, 1),
        v[:n].float(),
        -a_log.float().exp() * F.softplus(a[:n].float() + dt_bias),
        b[:n].float().sigmoid(),
    )
    part = cache.parts["scan"]
    state = slots.load(part).float()  # [R, N, Hk, Hv]
    out = torch.empty_like(x.v)
    lengths = [e - s for s, e in pairwise(rows.start)]
    single = torch.tensor([r for r, length in enumerate(lengths) if length == 1], dtype=torch.int64)
    if len(single):
        tokens = torch.tensor(rows.start)[single]
        out[tokens], state[single] = _one_token(x.at(tokens), state[single])
    offsets = dict(zip(slots.stored.tolist(), slots.offset.tolist(), strict=True))
    checkpoints = {r: state[r] for r in offsets if lengths[r] == 1}
    for r, length in enumerate(lengths):
        cuts = sorted({0, offsets.get(r, 0), length}) if length > 1 else []
        for begin, end in pairwise(cuts):
            part_of_row = slice(rows.start[r] + begin, rows.start[r] + end)
            out[part_of_row], state[r] = _many_tokens(x.at(part_of_row), state[r])
            if end == offsets.get(r):
                checkpoints[r] = state[r].clone()
    part[slots.write] = state.to(part.dtype)
    if checkpoints:
        part[slots.slot] = torch.stack([checkpoints[r] for r in offsets]).to(part.dtype)
    return _padded(out, v)


@dataclass(frozen=True)
class Inputs:
    """Float32 operands of the recurrence: q, k [n, N, Hk], v [n, N, Hv], g (log decay) and beta [n, N]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def at(self, tokens: slice | torch.Tensor) -> Inputs:
        """Those of some tokens."""
        return Inputs(self.q[tokens], self.k[tokens], self.v[tokens], self.g[tokens], self.beta[tokens])


def _unit(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    return x if eps is None else x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _one_token(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each row at once: state [R, N, Hk, Hv] -> (out [R, N, Hv], state)."""
    state = state * x.g.exp()[..., None, None]
    seen = (x.k[..., None, :] @ state)[..., 0, :]  # [R, N, Hv]
    update = x.beta[..., None] * (x.v - seen)
    state += x.k[..., :, None] * update[..., None, :]
    return (x.q[..., None, :] @ state)[..., 0, :], state


def _many_tokens(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one row, in chunks: state [N, Hk, Hv] -> (out [n, N, Hv], state)."""
    out = torch.empty_like(x.v)
    for at in range(0, x.v.shape[0], CHUNK):
        tokens = slice(at, at + CHUNK)
        out[tokens], state = _chunk(x.at(tokens), state)
    return out, state


def _chunk(x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of c tokens, solved at once.

    With G_t the sum of log decays up to t, each token's update u_t = beta_t (v_t - k_t S) obeys
    u_t + beta_t sum_{s<t} e^(G_t - G_s) (k_t . k_s) u_s = beta_t (v_t - e^(G_t) k_t S_0),
    a unit lower triangular system; then S_t = e^(G_t) S_0 + sum_{s<=t} e^(G_t - G_s) k_s u_s^T.
    """
    q, k, v = (y.transpose(0, 1) for y in (x.q, x.k, x.v))  # [N, c, H]
    beta = x.beta.T[..., None]  # [N, c, 1]
    total = x.g.T.double().cumsum(-1)  # [N, c]; differences of large sums lose float32's bits
    later = torch.ones((k.shape[1],) * 2, dtype=torch.bool).triu(1)
    decay = (total[:, :, None] - total[:, None, :]).masked_fill_(later, -torch.inf).exp().float()
    from_start = total.exp().float()[..., None]  # [N, c, 1]
    system = (k @ k.transpose(1, 2)) * decay * beta
    wanted = beta * (v - from_start * (k @ state))
    update = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = from_start * (q @ state) + ((q @ k.transpose(1, 2)) * decay) @ update
    to_end = (total[:, -1:] - total).exp().float()[..., None]
    state = from_start[:, -1:] * state + (k * to_end).transpose(1, 2) @ update
    return out.transpose(0, 1), state


def _padded(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """y for the real tokens in `like`'s dtype; zeros in padding."""
    out = like.new_zeros((like.shape[0], *y.shape[1:]))
    out[: y.shape[0]] = y.to(like.dtype)
    return out
