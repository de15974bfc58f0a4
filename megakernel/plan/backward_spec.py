"""What a compiled backward kernel is specialised on, beside what the forward's is."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import triton

from megakernel.plan.backward import backward_segments, needs_ds
from megakernel.plan.rules import GradientRule, WeightRule
from megakernel.plan.spec import KernelSpec


@dataclass(frozen=True)
class BackwardSpec(KernelSpec):
    """The spec of a backward launch: slots are experts in it, whatever placement the forward had.

    ``route`` is ``"given"`` (the launch sorts the ids into rows) or ``"replay"`` (the row tables
    are arguments); ``router`` says how weights were made, where ``gradients.weighs``.

    Attributes:
        gradients: what is asked for.
    """

    gradients: GradientRule

    is_backward: ClassVar[bool] = True
    num_signals: ClassVar[int] = 2
    counters_per_tile: ClassVar[int] = 2

    def __hash__(self) -> int:
        """Hash once, as its parent does."""
        return self._hash

    # The task list.

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Kinds of task in the order of the list; see backward.py."""
        makes_rows = self.route != "replay"
        return backward_segments(self.gradients, makes_rows, bool(self.num_slices))

    @cached_property
    def held(self) -> frozenset[int]:
        """Kinds of task in the list."""
        held = set(self.segments)
        if self.is_mixed:
            held |= {self.DDOWN, self.DX_SUM}
        return frozenset(held - {self.MIXED})

    @cached_property
    def is_mixed(self) -> bool:
        """Whether dx stands among the tasks of dDown."""
        return self.MIXED in self.segments

    @cached_property
    def has_ffn(self) -> bool:
        """Whether tasks are for row tiles."""
        return True

    @cached_property
    def has_ds(self) -> bool:
        """Whether gradients of weights are needed."""
        return needs_ds(self.gradients)

    @cached_property
    def recomputes(self) -> bool:
        """Whether FFN1 is run again."""
        return self.gradients.recomputes

    @cached_property
    def table_segment(self) -> int:
        """Place of the first segment that needs the row tables."""
        return self.segments.index(self.SCATTER) + 1

    @cached_property
    def num_waits(self) -> int:
        """Counters that a task of the list waits for at most, its row tables apart."""
        return 2

    @cached_property
    def first_tile_counter(self) -> int:
        """Index of the first row tile's counter of FFN1; that of dH follows each."""
        return self.AFTER_DS_DONE

    # Sizes.

    @cached_property
    def most_per_task(self) -> int:
        """FFN1 takes a block a task when it is run again, as dH does."""
        return 1

    @cached_property
    def dx_tasks(self) -> int:
        """dX tasks of a row tile."""
        return triton.cdiv(self.h_blocks, self.blocks_per_task)

    @cached_property
    def dx_per_task(self) -> int:
        """Blocks of H of a dX task: as even as can be."""
        return triton.cdiv(self.h_blocks, self.dx_tasks)

    @cached_property
    def z_width(self) -> int:
        """Columns of z: 2I, or I without a gate."""
        assert self.gate_up is not None
        return self.gate_up.stacked * self.gate_up.height

    @cached_property
    def z_blocks(self) -> int:
        """Blocks of rows of gate_up, ``block_i`` of them each."""
        return triton.cdiv(self.z_width, self.block_i)

    @cached_property
    def grad_step(self) -> int:
        """Rows, tokens or experts of a step where those are the depth of a product."""
        return min(self.step, self.block_rows)

    @cached_property
    def dh_columns(self) -> int:
        """Columns of dH finished at a time: more, and what they need would not fit registers."""
        return min(self.block_i, 32)

    @cached_property
    def stored_columns(self) -> int:
        """Columns of a product stored at a time: the fewer, the fewer addresses are held."""
        return min(self.block_h, 64)

    @cached_property
    def gather_stages(self) -> int:
        """Stages of a loop whose loads need a lookup each: Triton gives half of them to that."""
        return 2 * min(self.num_stages, 3) - 1

    # Tasks per tile of what writes the gradient of a weight; see KINDS for what a tile is.

    @cached_property
    def router_columns(self) -> int:
        """Blocks of H of dRouter, ``step`` columns each; 0 if only the bias is asked for."""
        return triton.cdiv(self.hidden, self.step) if self.gradients.router else 0

    @cached_property
    def router_tasks(self) -> int:
        """Those, then the bias."""
        return max(self.router_columns + self.gradients.router_bias, 1)

    @cached_property
    def gate_up_tasks(self) -> int:
        """A block of rows of gate_up each, and some blocks of H."""
        return self.z_blocks * self.dx_tasks

    @cached_property
    def down_columns(self) -> int:
        """Tasks of a block of rows of down."""
        return triton.cdiv(self.i_blocks, self.blocks_per_task)

    @cached_property
    def down_per_task(self) -> int:
        """Blocks of I of such a task."""
        return triton.cdiv(self.i_blocks, self.down_columns)

    @cached_property
    def down_tasks(self) -> int:
        """A block of rows of down each, and some blocks of I."""
        return self.h_blocks * self.down_columns

    @cached_property
    def shared_gate_up_tasks(self) -> int:
        """The same of a slice's gate or up."""
        return self.i_blocks * self.dx_tasks

    @cached_property
    def shared_matrices(self) -> int:
        """Which of a slice's gate and up have tasks: those that are not frozen."""
        return self.gradients.shared_gate + self.gradients.shared_up

    @cached_property
    def gate_up_bias_blocks(self) -> int:
        """Blocks of ``block_h`` columns of the first bias, 0 if it is not asked for."""
        return triton.cdiv(self.z_width, self.block_h) if self.gradients.gate_up_bias else 0

    @cached_property
    def bias_tasks(self) -> int:
        """Those, then the blocks of the second bias."""
        second = self.h_blocks if self.gradients.down_bias else 0
        return max(self.gate_up_bias_blocks + second, 1)

    @cached_property
    def weight_tasks(self) -> tuple[int, ...]:
        """Tasks of each kind from DROUTER on."""
        return (
            triton.cdiv(self.num_experts, self.block_experts) * self.router_tasks,
            self.num_experts * self.gate_up_tasks,
            self.num_experts * self.down_tasks,
            self.num_slices * self.shared_matrices * self.shared_gate_up_tasks,
            self.num_slices * self.down_tasks,
            self.num_experts * self.bias_tasks,
            self.h_blocks,
        )

    # How weights lie as the right side of products that go back through them.

    @cached_property
    def dh_rule(self) -> WeightRule:
        """``down`` with I as its rows and H as the depth."""
        return self._turned(self.down, self.intermediate, self.hidden, self.block_i)

    @cached_property
    def dx_rule(self) -> WeightRule:
        """``gate_up`` with H as its rows and all of gate and up as the depth."""
        return self._turned(self.gate_up, self.hidden, self.z_width, self.block_h)

    def _turned(self, rule: WeightRule | None, height: int, width: int, block: int) -> WeightRule:
        assert rule is not None
        shape = (1, height, width)
        return WeightRule.of_experts(shape, block, self.block_rows, not rule.transposed, rule.tma)

    @cached_property
    def ffn1_rule(self) -> WeightRule:
        """``gate_up`` where FFN1 is run again: through pointers, since two loops use TMA."""
        assert self.gate_up is not None
        return self.gate_up.of_tail(self.block_rows)

    @cached_property
    def shared_dh_rule(self) -> WeightRule:
        """The shared expert's down, a slice's columns as rows."""
        I, J, H = self.intermediate, self.shared_width, self.hidden
        most_rows = J if J % I else 0
        return WeightRule(1, I, H, self.block_i, self.block_rows, I, 0, 1, J, most_rows=most_rows)

    @cached_property
    def shared_dx_rule(self) -> WeightRule:
        """Its gate or its up, a slice's rows as the depth."""
        I, J, H = self.intermediate, self.shared_width, self.hidden
        return WeightRule(
            1, H, I, self.block_h, self.block_rows, I * H, 0, 1, H,
            most_columns=J if J % I else 0,
        )  # fmt: skip

    # Shapes of tiles held in registers, as the device code names them.

    @cached_property
    def gradient_tile(self) -> tuple[int, int]:
        """[block_i, block_h], of dGateUp and, turned, of dDown"""
        return self.block_i, self.block_h

    @cached_property
    def router_tile(self) -> tuple[int, int]:
        """[step, block_experts]"""
        return self.step, self.block_experts

    @cached_property
    def expert_row(self) -> tuple[int]:
        """[block_experts]"""
        return (self.block_experts,)

    @cached_property
    def turned_tile(self) -> tuple[int, int]:
        """[block_h, combine_tokens]"""
        return self.block_h, self.combine_tokens

    @cached_property
    def h_row(self) -> tuple[int]:
        """[block_h]"""
        return (self.block_h,)

    @cached_property
    def select_row(self) -> tuple[int]:
        """[select_tokens]"""
        return (self.select_tokens,)

    @cached_property
    def scores_tile(self) -> tuple[int, int]:
        """[select_tokens, experts_pad]"""
        return self.select_tokens, self.experts_pad
