"""Configs: what is legal, what is chosen."""

import pytest
import torch

from megakernel.config import (
    FLOAT32,
    INTERPRETER,
    SHIPPED,
    KernelConfig,
    default_height,
    usual_rows,
    why_illegal,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"block_rows": 8}, "block_rows must be a power of two of at least 16, got 8"),
        ({"step": 48}, "step must be a power of two of at least 16, got 48"),
        ({"num_workers": -1}, "num_workers must be a positive integer, got -1"),
        ({"num_stages": 2.5}, "num_stages must be a positive integer, got 2.5"),
        ({"max_polls": True}, "max_polls must be a positive integer, got True"),
        ({"select_tokens": 128}, "select_tokens must divide block_tokens=64, got 128"),
        ({"record_times": 1}, "record_times must be True or False, got 1"),
    ],
    ids=[
        "too low",
        "no power of two",
        "negative",
        "not an integer",
        "boolean",
        "no divisor",
        "a number for a flag",
    ],
)
def test_an_illegal_config_is_refused_with_the_rule(change, rule):
    with pytest.raises(ValueError, match=f"^{rule}$"):
        KernelConfig(**change)


@pytest.mark.parametrize("config", [*SHIPPED.values(), FLOAT32, INTERPRETER])
def test_shipped_configs_are_legal(config):
    assert why_illegal(config) is None


@pytest.mark.parametrize(
    ("rows_per_expert", "name"),
    [(0, "rows16"), (8, "rows16"), (16, "rows32"), (32, "rows64"), (64, "rows128"),
     (4096, "rows128")],
)  # fmt: skip
def test_the_usual_height_follows_rows_per_expert(rows_per_expert, name):
    assert default_height(rows_per_expert * 8, 8) == name
    assert usual_rows(rows_per_expert * 8, 8, GPU) == SHIPPED[name].block_rows
    assert usual_rows(rows_per_expert * 8, 8, CPU) == INTERPRETER.block_rows
