"""What a compiled kernel is specialised on: shapes, tiles, and where the routing comes from."""

from dataclasses import dataclass
from typing import ClassVar

import triton

from megakernel.plan.rules import ExpertRule, GateRule


@dataclass(frozen=True)
class KernelSpec:
    """Everything the compiler must know; one compiled kernel per spec and tensor types.

    ``route`` says where the routing comes from: ``"live"`` (the gate chooses), ``"given"`` (ids
    and weights are arguments) or ``"replay"`` (ids and row tables are arguments, weights live).
    ``split`` says how a token picks among the copies of its expert: ``"one"`` (slots are experts),
    ``"even"`` (copies take turns) or ``"slot"`` (the caller names the slot).
    """

    route: str
    split: str
    gate: GateRule
    expert: ExpertRule
    top_k: int
    num_experts: int
    num_slots: int
    max_copies: int
    hidden: int
    intermediate: int
    shared_width: int  # J, 0 without a shared expert
    block_rows: int
    block_i: int
    block_h: int
    step: int
    block_tokens: int
    block_experts: int
    select_tokens: int
    combine_tokens: int
    column_groups: int
    tile_group: int
    num_stages: int
    weight_tma: bool
    timed: bool
    interpreted: bool

    # Kinds of task.
    GATE: ClassVar[int] = 0
    PREFIX: ClassVar[int] = 1
    SCATTER: ClassVar[int] = 2
    FFN1: ClassVar[int] = 3
    FFN2: ClassVar[int] = 4
    COMBINE: ClassVar[int] = 5
    TAIL: ClassVar[int] = 6

    # Counters, in the order they lie in memory; column groups and row tiles follow.
    CLAIM: ClassVar[int] = 0
    EXIT: ClassVar[int] = 1
    GATE_DONE: ClassVar[int] = 2
    PREFIX_DONE: ClassVar[int] = 3
    SCATTER_DONE: ClassVar[int] = 4
    FIRST_GROUP: ClassVar[int] = 5
    COUNTER_STRIDE: ClassVar[int] = 32  # int32 words: 128 bytes, so no two counters share a line

    PREFIX_BINS: ClassVar[int] = 32  # bins per prefix task

    # What a timed launch writes for each task, in the order it lies in memory.
    WORKER: ClassVar[int] = 0
    CLAIMED: ClassVar[int] = 1
    READY: ClassVar[int] = 2
    DONE: ClassVar[int] = 3
    NUM_TIMES: ClassVar[int] = 4

    @property
    def replay(self) -> bool:
        """Whether the row tables are arguments."""
        return self.route == "replay"

    @property
    def num_bins(self) -> int:
        """Classes assignments are counted in: slots if the caller names them, else experts."""
        return self.num_slots if self.split == "slot" else self.num_experts

    @property
    def bins_pad(self) -> int:
        """Least power of two that holds the bins."""
        return max(16, triton.next_power_of_2(self.num_bins))

    @property
    def experts_pad(self) -> int:
        """Least power of two that holds the experts."""
        return max(16, triton.next_power_of_2(self.num_experts))

    @property
    def slots_pad(self) -> int:
        """Least power of two that holds the slots."""
        return max(16, triton.next_power_of_2(self.num_slots))

    @property
    def top_k_pad(self) -> int:
        """Least power of two that holds a token's choices."""
        return triton.next_power_of_2(self.top_k)

    @property
    def group_size(self) -> int:
        """Experts in one of the gate's groups."""
        return self.num_experts // self.gate.num_groups

    @property
    def prefix_blocks(self) -> int:
        """Prefix tasks of a live launch."""
        return -(-self.num_bins // self.PREFIX_BINS)

    @property
    def i_blocks(self) -> int:
        """FFN1 tasks per row tile."""
        return -(-self.intermediate // self.block_i)

    @property
    def group_blocks(self) -> int:
        """FFN2 tasks per row tile and column group."""
        h_blocks = -(-self.hidden // self.block_h)
        return -(-h_blocks // self.column_groups)

    @property
    def num_groups(self) -> int:
        """Column groups that hold a column: at most ``column_groups``."""
        return -(-self.hidden // (self.block_h * self.group_blocks))

    @property
    def num_slices(self) -> int:
        """Slices of the shared expert, each as wide as a routed one; the last may be short."""
        return -(-self.shared_width // self.intermediate)

    # Shapes of tiles held in registers, as the device code names them.

    @property
    def logits_tile(self) -> tuple[int, int]:
        """[block_tokens, block_experts]"""
        return self.block_tokens, self.block_experts

    @property
    def tokens_row(self) -> tuple[int]:
        """[block_tokens]"""
        return (self.block_tokens,)

    @property
    def choice_tile(self) -> tuple[int, int]:
        """[select_tokens, top_k_pad]"""
        return self.select_tokens, self.top_k_pad

    @property
    def experts_row(self) -> tuple[int]:
        """[experts_pad]"""
        return (self.experts_pad,)

    @property
    def groups_tile(self) -> tuple[int, int]:
        """[select_tokens, least power of two that holds the gate's groups]"""
        return self.select_tokens, triton.next_power_of_2(self.gate.num_groups)

    @property
    def bins_tile(self) -> tuple[int, int]:
        """[select_tokens, bins_pad]"""
        return self.select_tokens, self.bins_pad

    @property
    def bins_row(self) -> tuple[int]:
        """[bins_pad]"""
        return (self.bins_pad,)

    @property
    def prefix_row(self) -> tuple[int]:
        """[PREFIX_BINS]"""
        return (self.PREFIX_BINS,)

    @property
    def gate_up_block(self) -> int:
        """Rows of a stacked matrix that one FFN1 task takes."""
        return self.block_i * self.expert.rows_per_column

    @property
    def gate_up_height(self) -> int:
        """Rows of a stacked matrix."""
        return self.intermediate * self.expert.rows_per_column

    @property
    def ffn1_tile(self) -> tuple[int, int]:
        """[block_rows, gate and up columns]"""
        return self.block_rows, self.expert.stacked * self.gate_up_block

    @property
    def ffn1_halves(self) -> tuple[int, int, int]:
        """[block_rows, gate or up, block_i], or interleaved [block_rows, block_i, gate or up]"""
        if self.expert.interleaved:
            return self.block_rows, self.block_i, 2
        return self.block_rows, 2, self.block_i

    @property
    def shared_ffn1_tile(self) -> tuple[int, int]:
        """[block_rows, gate and up columns]"""
        return self.block_rows, self.block_i * (2 if self.expert.has_gate else 1)

    @property
    def shared_ffn1_halves(self) -> tuple[int, int, int]:
        """[block_rows, gate or up, block_i]"""
        return self.block_rows, 2, self.block_i

    @property
    def ffn2_tile(self) -> tuple[int, int]:
        """[block_rows, block_h]"""
        return self.block_rows, self.block_h

    @property
    def combine_tile(self) -> tuple[int, int]:
        """[combine_tokens, block_h]"""
        return self.combine_tokens, self.block_h

    @property
    def combine_unroll(self) -> int:
        """Choices whose rows are loaded together."""
        return min(self.top_k, 8)

    @property
    def first_tile_counter(self) -> int:
        """Index of the first row tile's counter."""
        return self.FIRST_GROUP + self.num_groups
