"""How long one task of a backward takes, from rooflines of the machine.

For layers without biases and without a shared expert, whose backward is asked for everything.
"""

from dataclasses import dataclass, replace

import numpy as np

from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.schedule import Task
from perf.measuring.roofline import GRADIENT_BYTES
from perf.simulator.costs import ELEMENT_BYTES, Demand, RooflineCosts

FLOAT_BYTES = 4


@dataclass
class BackwardCosts(RooflineCosts):
    """Demand of each task of a backward.

    Rows of dy and x are gathered as in the forward; those of z are read once. A gradient of a
    weight is nobody's input, so its stores drain under what the worker does next, and only what
    is added to has to be waited for.

    Attributes:
        gradients: key of GRADIENT_BYTES, how gradients of expert weights are kept.
    """

    spec: BackwardSpec
    gradients: str = "bfloat16"

    def __post_init__(self) -> None:
        """Sort the rows by expert, beside what a forward needs."""
        super().__post_init__()
        self.rows_of_E = np.bincount(
            self.tiles.expert_of_tile, self.tiles.rows_of_tile, self.spec.num_experts
        ).astype(int)

    def demand(self, task: Task) -> Demand:
        """Return what a task needs; changes what L2 holds."""
        spec = self.spec
        if task.kind == spec.FFN1:
            return self._ffn1_again(task)
        if task.kind == spec.DH:
            return self._dh(task)
        if task.kind == spec.DX:
            return self._dx(task)
        if task.kind in (spec.DGATE_UP, spec.DDOWN):
            return self._weight(task)
        if task.kind == spec.DX_SUM:
            return self._dx_sum()
        if task.kind in (spec.DS, spec.DROUTER):
            return Demand(0.0, self._ds_us() if task.kind == spec.DS else self._drouter_us())
        return super().demand(task)

    def _tile(self, task: Task) -> tuple[int, int]:
        return int(self.tiles.rows_of_tile[task.tile]), int(self.tiles.expert_of_tile[task.tile])

    def _busy(self, num_tasks: int) -> int:
        return min(self.num_workers, num_tasks)

    def _gathered(self, key: tuple, rows: int) -> float:
        """Return the bytes of some tokens' rows that come from memory."""
        spec, size = self.spec, rows * self.spec.hidden * ELEMENT_BYTES
        fits = self.num_tokens * spec.hidden * ELEMENT_BYTES < self.machine.cache_bytes
        return self.read(key, size // spec.top_k if fits else size)

    def _block_us(self, left: int, right: int, filled: int, depth: int, busy: int) -> float:
        """Time of the steps of one product of rows that exist; the tile is as high as it is."""
        machine, spec = self.machine, self.spec
        return max(
            self._product_us(left, right, depth, busy),
            self._read_us((filled + right) * depth * ELEMENT_BYTES, busy),
            -(-depth // spec.step) * machine.latency_us / max(spec.num_stages - 1, 1),
        )

    def _end_us(self, whole_us: float, area: int, written: float, busy: int) -> float:
        """Time behind the last step: as instructions for 128 by 256 values, or as stores."""
        share = area / (128 * 256) * max(busy / self.machine.num_sms, 1)
        return max(whole_us * share, self._read_us(written, busy))

    def _ffn1_again(self, task: Task) -> Demand:
        spec, machine = self.spec, self.machine
        rows, expert = self._tile(task)
        columns = 2 * spec.block_i
        busy = self._busy(len(self.tiles.rows_of_tile) * spec.i_blocks)
        missed = self.read(("up", expert, task.block), columns * spec.hidden * ELEMENT_BYTES)
        missed += self._gathered(("x", task.tile), rows)
        written = rows * columns * ELEMENT_BYTES
        self.write(("z", task.tile, task.block), written)
        end_us = self._end_us(machine.round_us, spec.block_rows * columns, written, busy)
        steps_us = self._block_us(spec.block_rows, columns, rows, spec.hidden, busy)
        fixed_us = 2 * machine.table_us + machine.latency_us + end_us
        return Demand(fixed_us, steps_us, missed + written)

    def _dh(self, task: Task) -> Demand:
        spec, machine = self.spec, self.machine
        rows, expert = self._tile(task)
        busy = self._busy(len(self.tiles.rows_of_tile) * spec.i_blocks)
        z_bytes = rows * 2 * spec.block_i * ELEMENT_BYTES
        weight_bytes = spec.block_i * spec.hidden * ELEMENT_BYTES
        missed = self.read(("down", expert, task.block), weight_bytes)
        missed += self._gathered(("dy", task.tile), rows)
        missed += self.read(("z", task.tile, task.block), z_bytes)
        # dz and A, with zeros in the rows that the tile lacks.
        written = 3 * spec.block_rows * spec.block_i * ELEMENT_BYTES
        self.write(("dz", task.tile), written)
        self.remember(("dz", expert, task.block), ("a", expert, task.block))
        area = 2 * spec.block_rows * spec.block_i
        end_us = self._end_us(machine.derive_us, area, written, busy)
        # z is read some columns at a time, and the next ones when those are done.
        z_us = spec.block_i / spec.dh_columns * machine.latency_us + self._read_us(z_bytes, busy)
        steps_us = self._block_us(spec.block_rows, spec.block_i, rows, spec.hidden, busy)
        fixed_us = 2 * machine.table_us + machine.latency_us + z_us + end_us
        return Demand(fixed_us, steps_us, missed + written)

    def _dx(self, task: Task) -> Demand:
        spec, machine = self.spec, self.machine
        rows, expert = self._tile(task)
        busy = self._busy(len(self.tiles.rows_of_tile) * spec.dx_tasks)
        blocks = range(task.block, min(task.block + spec.dx_per_task, spec.h_blocks))
        weight_bytes = spec.block_h * spec.z_width * ELEMENT_BYTES
        # The tiles of a group take the blocks in step, so no block stands between its own uses.
        missed = self.read(("back", expert, task.block), len(blocks) * weight_bytes)
        missed += self.read(("dz", task.tile), rows * spec.z_width * ELEMENT_BYTES)
        written = rows * spec.block_h * ELEMENT_BYTES
        self.write(("dx", task.tile), written * len(blocks))
        area = spec.block_rows * spec.block_h
        end_us = self._end_us(machine.round_us, area, written, busy)
        fixed_us = machine.table_us + len(blocks) * (machine.latency_us + end_us)
        steps_us = self._block_us(spec.block_rows, spec.block_h, rows, spec.z_width, busy)
        return Demand(fixed_us, len(blocks) * steps_us, missed + written * len(blocks))

    def _weight(self, task: Task) -> Demand:
        """A task of dGateUp or dDown: blocks of an output tile, the expert's rows their depth."""
        spec, machine = self.spec, self.machine
        rows, area = int(self.rows_of_E[task.tile]), spec.block_i * spec.block_h
        blocks = self._weight_blocks(task)
        moved = float(area * blocks * GRADIENT_BYTES[self.gradients])
        if not rows:
            is_kept = self.gradients == "added"
            return Demand(machine.table_us, 0.0, 0.0 if is_kept else moved)
        busy = self._busy(spec.num_experts * (spec.gate_up_tasks + spec.down_tasks))
        moved += self._weight_reads(task, rows)
        self._traffic += moved
        stored = ELEMENT_BYTES if self.gradients == "bfloat16" else FLOAT_BYTES
        end_us = self._end_us(machine.round_us, area, area * stored, busy)
        if self.gradients == "added":
            # Some columns at a time: the next ones are read when those are stored.
            end_us += spec.block_h / spec.stored_columns * machine.latency_us
            end_us += self._read_us(area * FLOAT_BYTES, busy)
        # Which rows are read is read ahead of them, which takes half of the stages.
        in_flight = max(spec.gather_stages // 2, 1)
        steps = -(-rows // spec.grad_step)
        depth = steps * spec.grad_step
        steps_us = max(
            self._product_us(spec.block_i, spec.block_h, depth, busy),
            self._read_us((spec.block_i + spec.block_h) * rows * ELEMENT_BYTES, busy),
            steps * machine.latency_us / in_flight,
        )
        fixed_us = machine.table_us + blocks * (2 * machine.latency_us + end_us)
        return Demand(fixed_us, blocks * steps_us, moved)

    def _weight_blocks(self, task: Task) -> int:
        spec = self.spec
        if task.kind == spec.DGATE_UP:
            first = task.block % spec.dx_tasks * spec.dx_per_task
            return max(min(spec.dx_per_task, spec.h_blocks - first), 0)
        first = task.block % spec.down_columns * spec.down_per_task
        return max(min(spec.down_per_task, spec.i_blocks - first), 0)

    def _weight_reads(self, task: Task, rows: int) -> float:
        """Return the bytes of such a task's two sides that come from memory."""
        spec = self.spec
        narrow = rows * spec.block_i * ELEMENT_BYTES
        if task.kind == spec.DGATE_UP:
            i_block = task.block // spec.dx_tasks % spec.i_blocks
            half = task.block // spec.dx_tasks // spec.i_blocks
            return self.read(("dz", task.tile, i_block, half), narrow) + self._gathered(
                ("x of", task.tile), rows
            )
        first = task.block % spec.down_columns * spec.down_per_task
        blocks = range(first, first + self._weight_blocks(task))
        missed = sum(self.read(("a", task.tile, block), narrow) for block in blocks)
        return missed + self._gathered(("dy of", task.tile), rows)

    def _dx_sum(self) -> Demand:
        """As the combine, and the router's product where dlogits lead back to the tokens."""
        spec, machine = self.spec, self.machine
        sums = self.combine()
        steps = -(-spec.num_experts // spec.grad_step) * spec.group_blocks
        return replace(sums, steps_us=sums.steps_us + steps * machine.latency_us)

    def _ds_us(self) -> float:
        """Parts of the rows' gradients one after the other, then scans as many as a router's."""
        spec, machine = self.spec, self.machine
        chunks = spec.block_tokens // spec.select_tokens
        loads = 2 + -(-spec.i_blocks // 8)  # rows, parts, logits; the parts' loads overlap
        scans = 2 * spec.top_k
        return chunks * (loads * machine.latency_us + scans * machine.scan_us)

    def _drouter_us(self) -> float:
        """A tile of the router's gradient: all tokens are its depth."""
        spec, machine = self.spec, self.machine
        busy = self._busy(spec.weight_tasks[0])
        steps = -(-self.num_tokens // spec.grad_step)
        left = spec.block_experts * spec.grad_step * FLOAT_BYTES
        right = spec.step * spec.grad_step * ELEMENT_BYTES
        step_us = max(
            self._product_us(spec.block_experts, spec.step, spec.grad_step, busy),
            self._read_us(left + right, busy),
            machine.latency_us / max(spec.num_stages - 1, 1),
        )
        return machine.latency_us + steps * step_us

    def remember(self, *keys: tuple) -> None:
        """Remember parts of what was just written, by other names."""
        self._last_use |= dict.fromkeys(keys, self._traffic)
