"""Virtual memory past 2^31 elements: a page exists once it is written."""

import numpy as np
import torch

WIDTH = 64
FAR_ROW = 90_000_000  # starts at element 5.76e9; the memory before it is reserved, never touched


def reserve(num_rows: int) -> np.ndarray:
    """Return memory for rows of WIDTH float32."""
    return np.empty(num_rows * WIDTH, dtype=np.float32)


def as_row(reserved: np.ndarray, row: int) -> torch.Tensor:
    """Return a tensor on one row, whose storage is that row alone."""
    return torch.from_numpy(reserved[row * WIDTH : (row + 1) * WIDTH])
