"""How long one task takes, for the simulator: from rooflines of the machine, or as measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megakernel.plan.order import plain
from megakernel.plan.protocol import FORWARD_NAMES, NAMES
from megakernel.plan.schedule import Task
from megakernel.plan.spec import KernelSpec
from perf.measuring.roofline import ASSUMED_H100, ASSUMED_H200, Roofs

ELEMENT_BYTES = 2
# Kinds of task that every forward has.
COMMON_NAMES = tuple(name for name in FORWARD_NAMES if not name.startswith("shared"))
WGMMA_ROWS = 64


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a GPU. Only ``roofs`` is measured, and only on a GPU.

    Attributes:
        roofs: dense product, copy, L2 reads.
        num_sms: multiprocessors.
        cache_bytes: L2.
        sm_bytes_per_s: what one multiprocessor can read, 64 bytes a clock.
        latency_us: from a load to its data under load; also the fill of a pipeline.
        claim_us, poll_us, signal_us: an atomic to memory and back; a barrier and an atomic.
        launch_us: from the launch to the first claim, and from the last task to the end.
        mma_share: rate of tiles below 64 rows, which wgmma cannot serve, over that of wgmma.
        scan_us: one pass over the experts' columns or the slots while choosing or counting.
        table_us: a look into a small table of the launch, from L2.
        activate_us, quick_activate_us, round_us: what lies between the last step of 128 rows by
            256 columns and the next task's first: of FFN1 with the exact and with the approximate
            sigmoid, and of FFN2. Counted instructions of the compiled kernel.
        derive_us: the same of dH for 128 rows by 128 columns of I, beside its loads of z: an
            estimate, half as much again as the exact activation.
    """

    roofs: Roofs = ASSUMED_H200
    num_sms: int = 132
    cache_bytes: float = 60e6
    sm_bytes_per_s: float = 110e9
    latency_us: float = 0.8
    claim_us: float = 0.8
    poll_us: float = 0.7
    signal_us: float = 0.6
    launch_us: float = 3.0
    mma_share: float = 0.6
    scan_us: float = 0.25
    table_us: float = 0.35
    activate_us: float = 1.6
    quick_activate_us: float = 1.1
    round_us: float = 0.7
    derive_us: float = 2.4


H200 = Machine()
H100 = Machine(ASSUMED_H100, cache_bytes=50e6)


@dataclass(frozen=True, eq=False)
class Tiles:
    """What the row tiles of a launch hold.

    Attributes:
        rows_of_tile: int64, filled rows, at least 1.
        expert_of_tile: int64.
    """

    rows_of_tile: np.ndarray
    expert_of_tile: np.ndarray


@dataclass(frozen=True)
class Demand:
    """What a task needs of the machine.

    Attributes:
        fixed_us: fill and store, before and after its steps.
        steps_us: its steps at the slowest rate but memory's.
        moved_bytes: from and to memory.
    """

    fixed_us: float
    steps_us: float
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Product:
    """The products of one task: rows times each of some column blocks.

    Attributes:
        rows, columns, depth: of one block.
        blocks: how many, one after the other.
        end_us: between the last step of a block and the next one's first, for a whole tile.
    """

    rows: int
    columns: int
    depth: int
    blocks: int
    end_us: float


@dataclass
class RooflineCosts:
    """Demand of each task: the slowest of product, L2 and latency, its traffic, and fixed parts.

    Workers on one multiprocessor share its tensor cores and bandwidth; a worker's waits and fills
    are then hidden by its neighbour's products, which is what several per multiprocessor are for.
    Memory traffic comes from a least-recently-used model of L2, asked in the order of the list.

    Attributes:
        spec, num_tokens, tiles: the launch.
        num_workers: programs.
        machine: the GPU.
        heights: row tile heights to choose from, the least that holds a tile's rows being used;
            other ones than the kernel's ask "what if".
        choices_in_flight: choices of a token that the combine loads at once; None for as many as
            the kernel does, any other number asks "what if".
    """

    spec: KernelSpec
    num_tokens: int
    tiles: Tiles
    num_workers: int
    machine: Machine = H200
    heights: tuple[int, ...] = ()
    choices_in_flight: int | None = None
    _traffic: float = field(default=0.0, init=False)
    _last_use: dict[tuple, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Choose the heights, and know which tasks take several blocks."""
        own = {self.spec.block_rows, self.spec.tail_rows or self.spec.block_rows}
        self.heights = tuple(sorted(self.heights or own))
        num_tiles = len(self.tiles.rows_of_tile)
        self.size = plain.sizes_of(self.num_tokens, num_tiles, 0, 0, True, self.spec)

    def __call__(self, tasks: Sequence[Task]) -> list[Demand]:
        """Return what each task of a list demands, from a cold L2 and in the order of the list."""
        self._traffic = 0.0
        self._last_use.clear()
        return [self.demand(task) for task in tasks]

    def demand(self, task: Task) -> Demand:
        """Return what a task needs; changes what L2 holds."""
        spec = self.spec
        if task.kind in (spec.FFN1, spec.SHARED_FFN1):
            return self._ffn1(task)
        if task.kind in (spec.FFN2, spec.SHARED_FFN2):
            return self._ffn2(task)
        if task.kind == spec.COMBINE:
            return self.combine()
        return Demand(0.0, (self.route_us, self._prefix, self._scatter)[task.kind]())

    def _ffn1(self, task: Task) -> Demand:
        spec, machine = self.spec, self.machine
        rows = int(self.tiles.rows_of_tile[task.tile])
        expert = int(self.tiles.expert_of_tile[task.tile])
        blocks = range(task.block, plain.ffn1_end_of(task.block, self.size, spec))
        weight_bytes = 2 * spec.block_i * spec.hidden * ELEMENT_BYTES
        token_bytes = rows * spec.hidden * ELEMENT_BYTES
        # Tokens recur in the tiles of their other experts; all of them often fit the cache.
        if self.num_tokens * spec.hidden * ELEMENT_BYTES < self.machine.cache_bytes:
            token_bytes //= spec.top_k
        missed = sum(self.read(("up", expert, block), weight_bytes) for block in blocks)
        missed += self.read(("x", task.tile), token_bytes)
        written = rows * spec.block_i * len(blocks) * ELEMENT_BYTES
        self.write(("h", task.tile), written)
        tasks = len(self.tiles.rows_of_tile) * plain.ffn1_tasks_of(self.size, spec)
        activate_us = machine.quick_activate_us if spec.fast_sigmoid else machine.activate_us
        # The rows' assignments are looked up with the tile's content, or only then.
        lookups_us = machine.table_us * (1 if spec.look_ahead else 2)
        product = Product(rows, 2 * spec.block_i, spec.hidden, len(blocks), activate_us)
        return self.gemm(product, lookups_us, missed, written, min(self.num_workers, tasks))

    def _ffn2(self, task: Task) -> Demand:
        spec, machine = self.spec, self.machine
        blocks = range(task.block, plain.ffn2_end_of(task.block, self.size, spec))
        if not blocks:
            return Demand(machine.table_us, 0.0)
        rows = int(self.tiles.rows_of_tile[task.tile])
        expert = int(self.tiles.expert_of_tile[task.tile])
        weight_bytes = spec.block_h * spec.intermediate * ELEMENT_BYTES
        missed = sum(self.read(("down", expert, block), weight_bytes) for block in blocks)
        missed += self.read(("h", task.tile), rows * spec.intermediate * ELEMENT_BYTES)
        written = rows * spec.block_h * len(blocks) * ELEMENT_BYTES
        self._traffic += written
        tasks = len(self.tiles.rows_of_tile) * plain.all_ffn2_tasks(self.size, spec)
        # Looked up while the worker polls for the tile's FFN1, or only then.
        lookup_us = 0.0 if spec.look_ahead else machine.table_us
        product = Product(rows, spec.block_h, spec.intermediate, len(blocks), machine.round_us)
        return self.gemm(product, lookup_us, missed, written, min(self.num_workers, tasks))

    def gemm(
        self, product: Product, lookups_us: float, missed: float, written: float, busy: int
    ) -> Demand:
        """A tile's products: lookups and one fill, steps at the slowest rate, the end of each.

        The first loads of a task's second block and of those after it run under the end of the
        block before.
        """
        machine, spec = self.machine, self.spec
        height = next(height for height in self.heights if height >= product.rows)
        steps = -(-product.depth // spec.step)
        read = (product.rows + product.columns) * product.depth * ELEMENT_BYTES
        steps_us = max(
            self._product_us(height, product.columns, product.depth, busy),
            self._read_us(read, busy),
            steps * machine.latency_us / max(spec.num_stages - 1, 1),
        )
        share = height * product.columns / (128 * 256) * max(busy / machine.num_sms, 1)
        end_us = max(product.end_us * share, self._read_us(written / product.blocks, busy))
        fixed_us = lookups_us + machine.latency_us + product.blocks * end_us
        return Demand(fixed_us, product.blocks * steps_us, missed + written)

    def combine(self) -> Demand:
        """One token tile: rows of all choices read from L2 as far as they fit, one row written."""
        spec, machine = self.spec, self.machine
        width_bytes = spec.group_blocks * spec.block_h * ELEMENT_BYTES
        hit = min(1.0, machine.cache_bytes / (self.num_tokens * spec.top_k * width_bytes))
        read = spec.combine_tokens * spec.top_k * width_bytes
        busy = min(self.num_workers, -(-self.num_tokens // spec.combine_tokens))
        # One block of columns after the other; for some choices their row ids, then their values.
        in_flight = self.choices_in_flight or spec.combine_unroll
        rounds = spec.group_blocks * -(-spec.top_k // in_flight)
        latency_us = rounds * 2 * machine.latency_us
        moved = (1 - hit) * read + spec.combine_tokens * width_bytes
        return Demand(0.0, max(self._read_us(read, busy), latency_us), moved)

    def route_us(self) -> float:
        """Time of one token tile's routing, by the scans and products that its route needs."""
        spec, machine = self.spec, self.machine
        chunks = spec.block_tokens // spec.select_tokens
        scans = 2 * spec.top_k  # counting the choices, ranking them
        if spec.route == "given":
            return chunks * (machine.latency_us + scans * machine.scan_us)
        if spec.route == "live":
            scans += 2 * spec.top_k  # largest logit, its column
        busy = min(self.num_workers, -(-self.num_tokens // spec.block_tokens))
        column_blocks = -(-spec.num_experts // spec.block_experts)
        steps = column_blocks * -(-spec.hidden // spec.step)
        read = (spec.block_tokens + spec.block_experts) * spec.step * ELEMENT_BYTES
        step_us = max(
            self._product_us(spec.block_tokens, spec.block_experts, spec.step, busy),
            self._read_us(read, busy),
            machine.latency_us / max(spec.num_stages - 1, 1),
        )
        return steps * step_us + chunks * (2 * machine.latency_us + scans * machine.scan_us)

    def _prefix(self) -> float:
        token_tiles = -(-self.num_tokens // self.spec.block_tokens)
        return self.machine.latency_us * (1 + -(-token_tiles // 32))

    def _scatter(self) -> float:
        spec, machine = self.spec, self.machine
        chunks = spec.block_tokens // spec.select_tokens
        share = -(-len(self.tiles.rows_of_tile) // -(-self.num_tokens // spec.block_tokens))
        table_rounds = -(-share // max(1, 2048 // spec.slots_pad))
        scans_us = (2 + 4 * table_rounds) * machine.scan_us
        return scans_us + 3 * (1 + chunks) * machine.latency_us

    def _product_us(self, height: int, columns: int, depth: int, busy: int) -> float:
        """Time of a product while ``busy`` workers share the tensor cores."""
        machine = self.machine
        rate = machine.roofs.dense_flops_per_s / max(busy, machine.num_sms)
        if height < WGMMA_ROWS:
            rate *= machine.mma_share
        return 1e6 * 2.0 * height * columns * depth / rate

    def _read_us(self, amount: float, busy: int) -> float:
        """Time to read from L2, limited by L2 and by the multiprocessor's port."""
        machine = self.machine
        port = machine.sm_bytes_per_s / max(1.0, busy / machine.num_sms)
        return 1e6 * amount / min(machine.roofs.l2_bytes_per_s / max(busy, 1), port)

    def read(self, key: tuple, size: float) -> float:
        """Return the bytes that come from memory, and remember the use."""
        since = self._traffic - self._last_use.get(key, -np.inf)
        missed = size if since > self.machine.cache_bytes else 0.0
        self._traffic += missed
        self._last_use[key] = self._traffic
        return missed

    def write(self, key: tuple, size: float) -> None:
        """Remember what a task wrote, which is in L2 from then on."""
        self._traffic += size
        self._last_use[key] = self._traffic


@dataclass(frozen=True)
class MeasuredCosts:
    """Mean of each kind of task of a forward, as measured; those of a shared expert if it has one.

    Attributes:
        us_of_kind: microseconds by the name of the kind.
    """

    us_of_kind: Mapping[str, float]

    def __post_init__(self) -> None:
        """Raise ValueError unless every kind that all layers have is there."""
        if missing := [name for name in COMMON_NAMES if name not in self.us_of_kind]:
            raise ValueError(f"us_of_kind must have every kind of task, got none for {missing}")

    def __call__(self, tasks: Sequence[Task]) -> list[Demand]:
        """Return each task's measured time as one that nothing stretches."""
        return [Demand(self.us_of_kind[NAMES[task.kind]], 0.0) for task in tasks]
