"""How many programs a launch has, how long a wait polls, and how soon a stall is named."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megakernel import MegakernelStall
from megakernel.config import KernelConfig
from megakernel.launch.run import resolve_polls, resolve_workers
from megakernel.launch.workspace import workspace_for
from megakernel.plan.spec import KernelSpec
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import SMALL, make_inputs, run
from tests.helpers.race.grid import builder, replaced

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_workers_and_polls_are_taken_as_given_or_from_the_device():
    assert resolve_workers(KernelConfig(num_workers=5), CPU) == 5
    assert resolve_workers(KernelConfig(), CPU) == 1
    assert resolve_polls(KernelConfig(max_polls=9), GPU) == 9
    assert resolve_polls(KernelConfig(), GPU) > 1_000_000 > resolve_polls(KernelConfig(), CPU)


@pytest.mark.parametrize("max_polls", [1, 7, 40])
def test_a_stall_is_named_after_so_many_polls(max_polls: int):
    """One worker waits as long as the config says; the others give up as soon as it has."""
    inputs = make_inputs(SHAPES[0])
    config = replace(SMALL, num_workers=5, max_polls=max_polls)
    expected = run(inputs, config=config).y_TH
    awaited = workspace_for(CPU).control.counters[
        KernelSpec.ROUTE_DONE * KernelSpec.COUNTER_STRIDE :
    ]
    awaited[0] = -100
    polls, change = [], builder.create_atomic_rmw

    def count(operation: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        if int(pointers.data.flat[0]) == awaited.data_ptr() and not value.data.any():
            polls.append(1)
        return change(operation, pointers, value, *rest)

    with (
        replaced({"create_atomic_rmw": count}),
        pytest.raises(MegakernelStall, match=r"\(prefix, block of bins 0\) waited for .*route"),
    ):
        run(inputs, config=config)
    assert len(polls) == max_polls
    assert_same_bits(actual=run(inputs, config=config).y_TH, expected=expected)
