"""Levers are turned one at a time around the default, and a misspelt one is refused."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from megakernel import KernelConfig
from megakernel.config import INTERPRETER, ROWS128
from perf.gpu import levers
from perf.gpu.levers import LEVERS, calls, turned
from perf.gpu.recording import distinct


def test_each_config_differs_from_the_default_in_one_field() -> None:
    configs = turned(ROWS128)
    assert configs.pop("default") == ROWS128
    for name, config in configs.items():
        field, _, value = name.partition("=")
        changed = {key for key, one in asdict(config).items() if one != getattr(ROWS128, key)}
        assert changed == {field} and str(getattr(config, field)) == value
    values = sum(len(set(values) - {getattr(ROWS128, name)}) for name, values in LEVERS.items())
    assert len(configs) == values >= 4


def test_every_lever_is_a_field() -> None:
    """Strictly: a sweep that left unknown names out would hide a misspelt one."""
    assert set(LEVERS) <= {field.name for field in fields(KernelConfig)}
    with pytest.raises(ValueError, match=r"fields of KernelConfig, got \['column_group'\]"):
        turned(ROWS128, {"column_group": (1, 2)})


def test_a_lever_that_is_off_or_on_has_one_other_setting() -> None:
    assert turned(INTERPRETER, {"record_times": (True, False)}) == {
        "default": INTERPRETER,
        "record_times=True": replace(INTERPRETER, record_times=True),
    }


def test_the_kernels_of_all_settings_are_compiled_ahead() -> None:
    settings = {
        replace(call.rule.config, num_workers=None, max_polls=None) for call in distinct(calls())
    }
    assert settings == set(turned(ROWS128).values())


def test_only_configs_that_leave_the_bits_alone_may_enter_the_table(monkeypatch) -> None:
    """One refuses to run, which whoever times it has to say."""
    outputs = {2: torch.tensor([1.0, -0.0]), 1: torch.tensor([1.0, 0.0])}

    def call(problem, route, config):
        return lambda: outputs[config.column_groups].clone()

    monkeypatch.setattr(levers, "configured_call", call)
    configs = turned(ROWS128, {"column_groups": (1, 4), "tile_group": (4,)})
    same = levers.configs_of_same_bits(None, configs)
    assert list(same) == ["default", "column_groups=4", "tile_group=4"]
