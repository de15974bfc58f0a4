"""How a launch is cut into tiles: the knobs, their limits, and the default for a problem."""

from dataclasses import dataclass, fields, replace

import torch

SHARED_LIMIT_BYTES = 232_448  # what one Hopper thread block may use

SAVES = ("preactivations", "nothing")  # what a forward keeps for its backward


@dataclass(frozen=True)
class LayerShape:
    """The sizes that a config is chosen for: E, K, H and I."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class KernelConfig:
    """The shape of every task in the launch. Equal configs give equal bits, whatever else changes.

    The values that fields have by default are those for training and prefill on a GPU; Triton's
    interpreter refuses tiles of that size, ``config.INTERPRETER`` is for it. Two launches whose
    configs differ only in ``num_workers``, ``workers_per_sm``, ``tile_group``, ``column_groups``,
    ``blocks_per_task``, ``least_tasks``, ``look_ahead``, ``half_tails``, ``cache_hints``,
    ``num_stages``, ``max_polls`` or ``record_times`` do the same arithmetic in the same order.

    Attributes:
        num_workers: persistent programs launched; None fills the device.
        block_rows: height of a row tile; every slot's rows are padded to it.
        block_i: FFN1 output columns per task (as many gate columns and as many up columns).
        block_h: FFN2 output columns per task.
        step: depth of one GEMM step, along H in FFN1 and the router, along I in FFN2.
        block_tokens: tokens per route and scatter task.
        block_experts: experts per product of the router.
        select_tokens: tokens whose top-k is chosen at once; divides block_tokens.
        combine_tokens: tokens per combine task.
        column_groups: parts of H whose combine runs under the GEMMs of the next part.
        tile_group: row tiles that share a weight block while it is in L2.
        blocks_per_task: column blocks that an FFN1 or FFN2 task takes one after the other, which
            saves claims and waits; one beside a shared expert. In a backward, those of a dX task
            and of a gradient of a weight.
        least_tasks: a task takes one block where FFN1, or FFN2 of a column group, would be left
            with fewer tasks, and in FFN2's last group: idle workers would cost more.
        look_ahead: whether a worker claims its next task before it signals the one it has done,
            and reads what it can before it waits (the latter not beside a shared expert).
        fast_sigmoid: whether silu, and the sigmoid of gelu_tanh and clamped_swiglu, take the GPU's
            approximate tanh where tokens are bfloat16: off by at most 2^-12 of what it
            multiplies, an eighth of that rounding.
        half_tails: whether row tiles of 128 rows that are at most half full are done at half the
            height.
        cache_hints: whether L2 is asked to keep the outputs of experts until they are combined.
        num_warps: warps per worker.
        num_stages: GEMM steps in flight.
        workers_per_sm: workers that fit one multiprocessor; used when num_workers is None.
        max_polls: polls of a counter before a wait gives up; None for the device's default.
        record_times: whether the launch writes each task's times, for tools.timeline.
    """

    num_workers: int | None = None
    block_rows: int = 128
    block_i: int = 128
    block_h: int = 256
    step: int = 64
    block_tokens: int = 64
    block_experts: int = 128
    select_tokens: int = 32
    combine_tokens: int = 16
    column_groups: int = 2
    tile_group: int = 8
    blocks_per_task: int = 4
    least_tasks: int = 512
    look_ahead: bool = True
    fast_sigmoid: bool = True
    half_tails: bool = False
    cache_hints: bool = False
    num_warps: int = 8
    num_stages: int = 4
    workers_per_sm: int = 1
    max_polls: int | None = None
    record_times: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError on a value that no device can run."""
        if reason := why_illegal(self):
            raise ValueError(reason)


POWERS_OF_TWO = {
    "block_rows": 16,
    "block_i": 16,
    "block_h": 16,
    "step": 16,
    "block_tokens": 16,
    "block_experts": 16,
    "select_tokens": 1,
    "combine_tokens": 1,
    "num_warps": 1,
}


def why_illegal(config: KernelConfig) -> str | None:
    """Return the rule that ``config`` breaks with the value it has, or None."""
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None and field.name in ("num_workers", "max_polls"):
            continue
        if field.type in (bool, "bool"):
            if not isinstance(value, bool):
                return f"{field.name} must be True or False, got {value!r}"
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f"{field.name} must be a positive integer, got {value!r}"
        least = POWERS_OF_TWO.get(field.name)
        if least is not None and (value < least or value & (value - 1)):
            return f"{field.name} must be a power of two of at least {least}, got {value}"
    if config.block_tokens % config.select_tokens:
        return (
            f"select_tokens must divide block_tokens={config.block_tokens}, "
            f"got {config.select_tokens}"
        )
    return None


# The shipped configs, by the height of a row tile: the lower, the less padding where an expert
# sees few rows. vLLM's and SGLang's tables, measured on an H200 for Triton products of these
# shapes, agree on height, width, step and warps; so does the simulator at 128 rows. No GEMM loop
# spills (compile_check).
ROWS16 = KernelConfig(
    block_rows=16, block_i=64, block_h=128, step=128, block_tokens=16, select_tokens=16,
    column_groups=8, blocks_per_task=1, num_warps=4, workers_per_sm=2,
)  # fmt: skip
ROWS32 = replace(ROWS16, block_rows=32, column_groups=2, num_stages=3)
ROWS64 = KernelConfig(
    block_rows=64, block_i=64, block_h=128, block_experts=64, select_tokens=16, column_groups=4,
    blocks_per_task=1, num_warps=4, workers_per_sm=2,
)  # fmt: skip
ROWS128 = KernelConfig()
SHIPPED = {"rows16": ROWS16, "rows32": ROWS32, "rows64": ROWS64, "rows128": ROWS128}

# True float32 has no tensor core: narrow tiles keep the accumulators in registers, also at the
# height that a replay prepared for another config brings along.
FLOAT32 = KernelConfig(
    block_rows=32, block_i=16, block_h=32, step=16, block_experts=32, select_tokens=16,
    blocks_per_task=1, num_warps=8, num_stages=2,
)  # fmt: skip
# The interpreter pays per operation, not per element.
INTERPRETER = KernelConfig(
    num_workers=4, block_rows=32, block_i=64, step=128, block_tokens=32, block_experts=64,
    combine_tokens=32, tile_group=4, least_tasks=1,
)  # fmt: skip


def default_height(num_assignments: int, num_experts: int) -> str:
    """Name the shipped config whose row tile fits a mean load.

    The bounds lie between the loads at which vLLM's and SGLang's tables for the H200 change
    height: 128 experts of width 768 and 1024, 8 experts of width 7168 and 14336.
    """
    mean_rows = num_assignments / num_experts
    for bound, name in ((10, "rows16"), (24, "rows32"), (48, "rows64")):
        if mean_rows <= bound:
            return name
    return "rows128"


def shipped_config(num_assignments: int, num_experts: int) -> KernelConfig:
    """Return the shipped config of :func:`default_height`."""
    return SHIPPED[default_height(num_assignments, num_experts)]


def usual_rows(num_assignments: int, num_experts: int, device: torch.device) -> int:
    """Return the tile height for a mean load of 16-bit tokens, where no tuned config is known."""
    if device.type == "cpu":
        return INTERPRETER.block_rows
    return shipped_config(num_assignments, num_experts).block_rows
