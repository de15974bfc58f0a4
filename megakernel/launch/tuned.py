"""The config of a call that names none: the fastest measured, else the shipped one that fits.

``tuned.json`` holds what ``python -m perf tune`` measured, entry by entry with GPU and commit.
Where nothing fits, another GPU for example, the default depends on rows per expert alone.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megakernel.config import (
    FLOAT32,
    INTERPRETER,
    SHIPPED,
    KernelConfig,
    LayerShape,
    shipped_config,
)

TABLE_PATH = Path(__file__).with_name("tuned.json")
NEAREST_FACTOR = 4  # an entry serves at most so many times more or fewer tokens than it was for


@dataclass(frozen=True)
class Tuned:
    """The fastest config of those tried on a GPU for a layer and a number of tokens.

    Attributes:
        gpu: its name, as torch.cuda.get_device_name says it.
        layer: sizes of the layer.
        num_tokens: T.
        config: to use.
        median_us: of each route it was measured on.
        shipped_us: the same for the config that would be used without the table.
        torch, triton, commit, date: of the measurement.
    """

    gpu: str
    layer: LayerShape
    num_tokens: int
    config: KernelConfig
    median_us: dict[str, float]
    shipped_us: dict[str, float]
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, LayerShape, int]:
        """What there is one entry for."""
        return self.gpu, self.layer, self.num_tokens


def read_table(path: Path) -> tuple[Tuned, ...]:
    """Return the entries of a table; none if there is no such file.

    Raises:
        ValueError: naming the file and the entry that is none.
    """
    if not path.exists():
        return ()
    try:
        listed = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    entries = []
    for place, values in enumerate(listed):
        try:
            parts = {
                "layer": LayerShape(**values["layer"]),
                "config": KernelConfig(**values["config"]),
            }
            entries.append(Tuned(**values | parts))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {place} is no tuned config: {error}") from error
    return tuple(entries)


TABLE = read_table(TABLE_PATH)


def find_tuned(
    table: Iterable[Tuned], gpu: str, layer: LayerShape, num_tokens: int
) -> KernelConfig | None:
    """Return the config of the entry nearest in tokens, or None where none is near.

    Args:
        table: entries.
        gpu: name of the device.
        layer: sizes of the layer.
        num_tokens: T, at least 1.
    """
    nearest, least_factor = None, float(NEAREST_FACTOR)
    for entry in table:
        if entry.gpu == gpu and entry.layer == layer:
            factor = max(entry.num_tokens, num_tokens) / min(entry.num_tokens, num_tokens)
            if factor <= least_factor:
                nearest, least_factor = entry.config, factor
    return nearest


def default_config(
    layer: LayerShape, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> KernelConfig:
    """Return the config of a call that names none.

    Args:
        layer: sizes of the layer.
        num_tokens: T.
        dtype: of the tokens and weights.
        device: where they live.
    """
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    gpu = gpu_name(device.index) if TABLE else ""  # asked at every call, so only when it matters
    return config_on(gpu, layer, num_tokens)


def config_on(gpu: str, layer: LayerShape, num_tokens: int) -> KernelConfig:
    """Return the config for 16-bit weights on a GPU: tuned if the table has one, else shipped."""
    tuned = find_tuned(TABLE, gpu, layer, max(num_tokens, 1))
    return tuned or shipped_config(num_tokens * layer.top_k, layer.num_experts)


def at_height(config: KernelConfig, block_rows: int) -> KernelConfig:
    """Return the default config at the only height that a replay's tables have.

    At another height the other tiles of a config for 16 bits need not fit: the shipped ones do.
    """
    if config.block_rows == block_rows:
        return config
    shipped = None if config in (FLOAT32, INTERPRETER) else SHIPPED.get(f"rows{block_rows}")
    return shipped or replace(config, block_rows=block_rows)


@torch.compiler.assume_constant_result
def gpu_name(index: int | None) -> str:
    """Return the name of a GPU, the current one if None; a constant while torch.compile traces."""
    return torch.cuda.get_device_name(index)
