"""What a compiled kernel is specialised on: shapes, tiles, and where the routing comes from."""

from dataclasses import astuple, dataclass
from functools import cached_property
from typing import ClassVar

import triton

from megakernel.plan.forward import SEGMENTS, held_kinds
from megakernel.plan.protocol import Protocol
from megakernel.plan.rules import ExpertRule, RouterRule, WeightRule


@dataclass(frozen=True)
class KernelSpec(Protocol):
    """Everything the compiler must know; one compiled kernel per spec and tensor types.

    Derived values are kept, since every call asks for some. Fields whose meaning is not said here
    are those of :class:`megakernel.config.KernelConfig`.

    Attributes:
        stages: ``"layer"``, ``"rows"`` (the FFN of sorted rows, no combine) or ``"combine"``
            (of given rows).
        route: where the routing comes from: ``"live"`` (the router chooses), ``"given"`` (ids
            and weights are arguments) or ``"replay"`` (ids and row tables are arguments, weights
            live).
        split: how a token picks among the copies of its expert: ``"one"`` (slots are experts),
            ``"even"`` (copies take turns) or ``"slot"`` (the caller names the slot).
        router, expert: what they compute.
        gate_up, down: how the weights lie; None in a launch without experts.
        top_k: K.
        num_experts: E.
        num_slots: P.
        max_copies: V.
        hidden: H.
        intermediate: I.
        shared_width: J, 0 without a shared expert.
        timed: whether each task's times are kept.
        fenced: whether the fences that this Triton leaves out are added; see launch/fences.py.
        interpreted: whether Triton's interpreter runs the kernel.
    """

    stages: str
    route: str
    split: str
    router: RouterRule
    expert: ExpertRule
    gate_up: WeightRule | None
    down: WeightRule | None
    top_k: int
    num_experts: int
    num_slots: int
    max_copies: int
    hidden: int
    intermediate: int
    shared_width: int
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
    blocks_per_task: int
    least_tasks: int
    look_ahead: bool
    fast_sigmoid: bool
    half_tails: bool
    cache_hints: bool
    num_stages: int
    timed: bool
    fenced: bool
    interpreted: bool

    def __hash__(self) -> int:
        """Hash once: a spec is a key several times in every call."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(astuple(self))

    # The task list.

    is_backward: ClassVar[bool] = False
    num_signals: ClassVar[int] = 1  # counters that a task of the list adds to at most
    counters_per_tile: ClassVar[int] = 1

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Kinds of task in the order of the list; see forward.py."""
        segments = SEGMENTS[self.stages, self.route]
        return tuple(s for s in segments if self.num_slices or s != self.SHARED_FFN1)

    @cached_property
    def num_segments(self) -> int:
        """How many there are."""
        return len(self.segments)

    @cached_property
    def held(self) -> frozenset[int]:
        """Kinds of task in the list."""
        return held_kinds(self.segments)

    @cached_property
    def has_tail(self) -> bool:
        """Whether FFN2 and combine are interleaved."""
        return self.TAIL in self.segments

    @cached_property
    def has_ffn(self) -> bool:
        """Whether the list runs the experts."""
        return self.FFN2 in self.held

    @cached_property
    def has_shared(self) -> bool:
        """Whether it runs a shared expert."""
        return self.SHARED_FFN1 in self.held

    @cached_property
    def has_combine(self) -> bool:
        """Whether the list sums the rows of each token."""
        return self.COMBINE in self.held

    @cached_property
    def quick_sigmoid(self) -> bool:
        """Whether activations take the GPU's approximate tanh, which the interpreter lacks."""
        return self.fast_sigmoid and not self.interpreted

    @cached_property
    def reads_ahead(self) -> bool:
        """Whether tables are read before a wait: a shared expert's loops leave no registers."""
        return self.look_ahead and not self.num_slices

    @cached_property
    def has_route(self) -> bool:
        """Whether the list chooses, checks or weighs."""
        return self.ROUTE in self.held

    @cached_property
    def makes_rows(self) -> bool:
        """Whether the launch sorts assignments into rows itself, and so counts its row tiles."""
        return self.SCATTER in self.held

    @cached_property
    def table_segment(self) -> int:
        """Place of the first segment that needs the row tables."""
        return self.segments.index(self.FFN1)

    @cached_property
    def weighs_late(self) -> bool:
        """Whether the combine has to wait for weights that no other wait of it implies."""
        return self.route == "replay" and self.has_route

    @cached_property
    def num_waits(self) -> int:
        """Counters that a task of the list waits for at most, its row tables apart."""
        return 2 if self.weighs_late else 1

    # Sizes.

    @cached_property
    def num_bins(self) -> int:
        """Classes assignments are counted in: slots if the caller names them, else experts."""
        return self.num_slots if self.split == "slot" else self.num_experts

    @cached_property
    def bins_pad(self) -> int:
        """Least power of two that holds the bins."""
        return max(16, triton.next_power_of_2(self.num_bins))

    @cached_property
    def experts_pad(self) -> int:
        """Least power of two that holds the experts."""
        return max(16, triton.next_power_of_2(self.num_experts))

    @cached_property
    def slots_pad(self) -> int:
        """Least power of two that holds the slots."""
        return max(16, triton.next_power_of_2(self.num_slots))

    @cached_property
    def top_k_pad(self) -> int:
        """Least power of two that holds a token's choices."""
        return triton.next_power_of_2(self.top_k)

    @cached_property
    def experts_per_group(self) -> int:
        """Experts in one of the router's groups."""
        return self.num_experts // self.router.num_groups

    @cached_property
    def prefix_blocks(self) -> int:
        """Prefix tasks of a launch that makes its rows."""
        return triton.cdiv(self.num_bins, self.PREFIX_BINS)

    @cached_property
    def i_blocks(self) -> int:
        """Blocks of I."""
        return triton.cdiv(self.intermediate, self.block_i)

    @cached_property
    def h_blocks(self) -> int:
        """Blocks of H."""
        return triton.cdiv(self.hidden, self.block_h)

    @cached_property
    def group_blocks(self) -> int:
        """Blocks of H per column group, those past H among them."""
        return triton.cdiv(self.h_blocks, self.column_groups)

    @cached_property
    def num_column_groups(self) -> int:
        """Column groups that hold a column: at most ``column_groups``."""
        return triton.cdiv(self.hidden, self.block_h * self.group_blocks)

    # A row tile's tasks of several blocks, and the blocks of each but the last.

    @cached_property
    def most_per_task(self) -> int:
        """Blocks of a task; one beside a shared expert, whose loops leave no register for more."""
        return 1 if self.num_slices else self.blocks_per_task

    @cached_property
    def i_tasks(self) -> int:
        """FFN1 tasks."""
        return triton.cdiv(self.i_blocks, self.most_per_task)

    @cached_property
    def i_per_task(self) -> int:
        """Blocks of I: as even as can be."""
        return triton.cdiv(self.i_blocks, self.i_tasks)

    @cached_property
    def h_tasks(self) -> int:
        """FFN2 tasks of a column group."""
        return triton.cdiv(self.group_blocks, self.most_per_task)

    @cached_property
    def h_per_task(self) -> int:
        """Blocks of H: as even as can be."""
        return triton.cdiv(self.group_blocks, self.h_tasks)

    @cached_property
    def num_slices(self) -> int:
        """Slices of the shared expert, each as wide as a routed one; the last may be short."""
        return triton.cdiv(self.shared_width, self.intermediate)

    @cached_property
    def first_tile_counter(self) -> int:
        """Index of the first row tile's counter."""
        return self.FIRST_COLUMN_GROUP + self.num_column_groups

    @cached_property
    def combine_unroll(self) -> int:
        """Choices whose rows are loaded together."""
        return min(self.top_k, 8)

    # Row tiles that are at most half full, done at half the height.

    @cached_property
    def tail_rows(self) -> int:
        """Rows that such a tile may hold, 0 without: wgmma serves no fewer than 64."""
        half = self.block_rows // 2
        return half if self.half_tails and (half >= 64 or self.interpreted) else 0

    @cached_property
    def gate_up_tail(self) -> WeightRule | None:
        """``gate_up`` for them."""
        return self.gate_up and self.gate_up.of_tail(self.tail_rows)

    @cached_property
    def down_tail(self) -> WeightRule | None:
        """``down`` for them."""
        return self.down and self.down.of_tail(self.tail_rows)

    # The shared expert's weights: slices are its experts, cut out of one matrix [J, H] or [H, J].

    @cached_property
    def shared_gate_up(self) -> WeightRule:
        """Gate and up, tensors of their own; slices lie one below the other."""
        stacked, I, H = 2 if self.expert.has_gate else 1, self.intermediate, self.hidden
        return WeightRule(
            stacked, I, H, self.block_i, self.block_rows, I * H, 0, H, 1, apart=True,
            most_rows=self.shared_width if self.shared_width % I else 0,
        )  # fmt: skip

    @cached_property
    def shared_down(self) -> WeightRule:
        """Slices lie side by side."""
        I, J = self.intermediate, self.shared_width
        return WeightRule(
            1, self.hidden, I, self.block_h, self.block_rows, I, 0, J, 1,
            most_columns=J if J % I else 0,
        )  # fmt: skip

    # Shapes of tiles held in registers, as the device code names them.

    @cached_property
    def logits_tile(self) -> tuple[int, int]:
        """[block_tokens, block_experts]"""
        return self.block_tokens, self.block_experts

    @cached_property
    def tokens_row(self) -> tuple[int]:
        """[block_tokens]"""
        return (self.block_tokens,)

    @cached_property
    def choice_tile(self) -> tuple[int, int]:
        """[select_tokens, top_k_pad]"""
        return self.select_tokens, self.top_k_pad

    @cached_property
    def experts_row(self) -> tuple[int]:
        """[experts_pad]"""
        return (self.experts_pad,)

    @cached_property
    def groups_tile(self) -> tuple[int, int]:
        """[select_tokens, least power of two that holds the router's groups]"""
        return self.select_tokens, triton.next_power_of_2(self.router.num_groups)

    @cached_property
    def bins_tile(self) -> tuple[int, int]:
        """[select_tokens, bins_pad]"""
        return self.select_tokens, self.bins_pad

    @cached_property
    def bins_row(self) -> tuple[int]:
        """[bins_pad]"""
        return (self.bins_pad,)

    @cached_property
    def prefix_row(self) -> tuple[int]:
        """[PREFIX_BINS]"""
        return (self.PREFIX_BINS,)

    @cached_property
    def combine_tile(self) -> tuple[int, int]:
        """[combine_tokens, block_h]"""
        return self.combine_tokens, self.block_h
