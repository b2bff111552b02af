"""StepPlan: what the scheduler decided for one step; read by the batch builder."""

from __future__ import annotations

from dataclasses import dataclass

from core.block_manager import BlockCopy
from core.contract.batch import Int32
from core.contract.types import StepKind


@dataclass(frozen=True)
class PrefillRow:
    """A chunk of one sequence: tokens [start, start + count) of the slot. `samples`: slots that draw from its
    last token.
    """

    slot: int
    start: int
    count: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Row `row` also stores its state after `offset` of its tokens, in state slot `slot` of cache group
    `group`.
    """

    row: int
    group: int
    offset: int
    slot: int


@dataclass(frozen=True)
class PromptRow:
    """Prompt tokens whose log-probabilities are wanted: the step's tokens from `first` on predict `targets`.

    Attributes:
        slot: of the sequence. start: position of the token that predicts the first target.
        first: index of that token in the step. targets: int32 [m]. top: most likely ids to report, too.
    """

    slot: int
    start: int
    first: int
    targets: Int32
    top: int


@dataclass(frozen=True)
class StepPlan:
    """One step. Rows are the decode slots in order, then the prefill rows.

    Attributes:
        decode: slots that decode one token each, int32 [n]. positions: position of that token, int32 [n].
        copies: block copies to do before the step. prompts: where there are any, the logits of all tokens are
            needed.
    """

    step_id: int
    decode: Int32
    positions: Int32
    prefills: tuple[PrefillRow, ...]
    copies: tuple[BlockCopy, ...]
    checkpoints: tuple[Checkpoint, ...]
    prompts: tuple[PromptRow, ...] = ()

    @property
    def kind(self) -> StepKind:
        """Which kind of bucket it needs."""
        if not self.prefills:
            return "decode"
        return "mixed" if len(self.decode) else "prefill"

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return len(self.decode) + sum(row.count for row in self.prefills)

    @property
    def num_requests(self) -> int:
        """Real rows."""
        return len(self.decode) + len(self.prefills)
