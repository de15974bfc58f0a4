"""Configs: what is legal, what is chosen, how a config travels through a custom op."""

import pytest
import torch

from megakernel.config import (
    FLOAT32,
    INTERPRETER,
    SHIPPED,
    KernelConfig,
    default_config,
    resolve_polls,
    resolve_workers,
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
    ],
    ids=["too low", "no power of two", "negative", "not an integer", "boolean", "no divisor"],
)
def test_an_illegal_config_is_refused_with_the_rule(change, rule):
    with pytest.raises(ValueError, match=f"^{rule}$"):
        KernelConfig(**change)


@pytest.mark.parametrize("config", [*SHIPPED.values(), FLOAT32, INTERPRETER])
def test_shipped_configs_are_legal_and_survive_the_custom_op(config):
    assert why_illegal(config) is None
    assert KernelConfig.decode(config.encode()) == config


@pytest.mark.parametrize(
    ("tokens", "dtype", "device", "expected"),
    [
        (8192, torch.bfloat16, GPU, SHIPPED["tall"]),
        (1024, torch.float16, GPU, SHIPPED["middle"]),
        (64, torch.bfloat16, GPU, SHIPPED["low"]),
        (8192, torch.float32, GPU, FLOAT32),
        (8192, torch.bfloat16, CPU, INTERPRETER),
    ],
    ids=["512 rows per expert", "64 rows", "4 rows", "no tensor cores", "interpreted"],
)
def test_the_default_follows_rows_per_expert_dtype_and_device(tokens, dtype, device, expected):
    assert default_config(tokens * 8, 128, dtype, device) == expected


def test_workers_and_polls_are_taken_as_given_or_from_the_device():
    assert resolve_workers(KernelConfig(num_workers=5), CPU) == 5
    assert resolve_workers(KernelConfig(), CPU) == 1
    assert resolve_polls(KernelConfig(max_polls=9), GPU) == 9
    assert resolve_polls(KernelConfig(), GPU) > 1_000_000 > resolve_polls(KernelConfig(), CPU)
