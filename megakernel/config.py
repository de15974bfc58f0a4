"""How a launch is cut into tiles: the knobs, their limits, and the default for a problem."""

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

SHARED_LIMIT_BYTES = 232_448  # what one Hopper thread block may use


@dataclass(frozen=True)
class KernelConfig:
    """The shape of every task in the launch. Equal configs give equal bits, whatever else changes.

    Two launches whose configs differ only in ``num_workers``, ``workers_per_sm``, ``tile_group``,
    ``column_groups``, ``num_stages`` or ``max_polls`` do the same arithmetic in the same order.

    Attributes:
        num_workers: persistent programs launched; None fills the device.
        block_rows: height of a row tile; every slot's rows are padded to it.
        block_i: FFN1 output columns per task (as many gate columns and as many up columns).
        block_h: FFN2 output columns per task.
        step: depth of one GEMM step, along H in FFN1 and the gate, along I in FFN2.
        block_tokens: tokens per gate and scatter task.
        block_experts: router columns per gate GEMM.
        select_tokens: tokens whose top-k is chosen at once; divides block_tokens.
        combine_tokens: tokens per combine task.
        column_groups: parts of H whose combine runs under the GEMMs of the next part.
        tile_group: row tiles that share a weight block while it is in L2.
        num_warps: warps per worker.
        num_stages: GEMM steps in flight.
        workers_per_sm: workers that fit one multiprocessor; used when num_workers is None.
        max_polls: polls of a counter before a wait gives up; None for the device's default.
    """

    num_workers: int | None = None
    block_rows: int = 128
    block_i: int = 64
    block_h: int = 128
    step: int = 64
    block_tokens: int = 64
    block_experts: int = 64
    select_tokens: int = 16
    combine_tokens: int = 16
    column_groups: int = 4
    tile_group: int = 8
    num_warps: int = 4
    num_stages: int = 3
    workers_per_sm: int = 2
    max_polls: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on a value that no device can run."""
        if reason := why_illegal(self):
            raise ValueError(reason)

    def encode(self) -> list[int]:
        """Return the fields as integers, -1 for None (a custom op takes no dataclass)."""
        return [-1 if value is None else value for value in astuple(self)]

    @classmethod
    def decode(cls, values: list[int]) -> "KernelConfig":
        """Invert :meth:`encode`."""
        decoded: list[Any] = [None if value == -1 else value for value in values]
        return cls(*decoded)


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


# The shipped configs. The tall one is for training and prefill, the low ones keep padding small
# when an expert sees few rows. Shapes compile without spills in the GEMM loops (compile_check).
TALL = KernelConfig()
MIDDLE = KernelConfig(block_rows=64, num_stages=4)
LOW = KernelConfig(block_rows=16, block_h=64, step=128, num_stages=4, block_tokens=16)
SHIPPED = {"tall": TALL, "middle": MIDDLE, "low": LOW}

# True float32 has no tensor core: narrow tiles keep the accumulators in registers, also at the
# tall height that a replay prepared without a config brings along.
FLOAT32 = KernelConfig(
    block_rows=32, block_i=16, block_h=32, step=32, block_experts=32, num_warps=8, num_stages=2
)
# The interpreter pays per operation, not per element.
INTERPRETER = KernelConfig(
    num_workers=4, block_rows=32, block_h=256, step=128, block_tokens=32, select_tokens=32,
    combine_tokens=32, column_groups=2, tile_group=4,
)  # fmt: skip


def default_config(
    num_assignments: int, num_experts: int, dtype: torch.dtype, device: torch.device
) -> KernelConfig:
    """Pick the shipped config for a problem from its mean rows per expert.

    Args:
        num_assignments: T·K.
        num_experts: E.
        dtype: of the tokens and weights.
        device: where they live.
    """
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    return SHIPPED[default_height(num_assignments, num_experts)]


def default_height(num_assignments: int, num_experts: int) -> str:
    """Name the shipped config whose row tile wastes little padding at this mean load."""
    mean_rows = num_assignments / num_experts
    if mean_rows <= 24:
        return "low"
    return "middle" if mean_rows <= 96 else "tall"


def resolve_workers(config: KernelConfig, device: torch.device) -> int:
    """Return how many programs to launch."""
    if config.num_workers is not None:
        return config.num_workers
    if device.type == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * config.workers_per_sm


def resolve_polls(config: KernelConfig, device: torch.device) -> int:
    """Return how often a wait polls before it gives up.

    On a GPU the default lasts seconds. Interpreted programs run one after another, so there a
    counter that is not yet satisfied never will be.
    """
    if config.max_polls is not None:
        return config.max_polls
    return 2 if device.type == "cpu" else 1 << 23
