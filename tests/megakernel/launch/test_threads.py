"""Threads that launch at once are served one after another, and nobody waits for ever."""

import subprocess
import sys
import time
from threading import Thread

import pytest
import torch

from megakernel.device.kernel import moe_kernel
from megakernel.launch.streams import TURN
from megakernel.launch.workspace import workspace_for
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import make_inputs, run
from tests.helpers.sources import ROOT
from tests.helpers.streams import CPU, make_up_streams

LIMIT_SECONDS = 240  # a deadlock's; a fifth of it is usual


def run_child(*command: str) -> None:
    """Run a module in a process of its own, and demand that it finds nothing wrong."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True,
        timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "which", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["layer", "models too"]
)
def test_threads_get_the_bits_of_calls_made_alone(which: tuple[str, ...]):
    run_child("tests.helpers.threads", *which)


def test_a_process_forked_while_a_thread_launches_can_call():
    run_child("tests.helpers.forks")


def in_a_thread(call) -> list:
    """Return what a call made by another thread returned, if it did so in time."""
    returned: list = []
    thread = Thread(target=lambda: returned.append(call()), daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS)
    return returned


def test_a_launch_that_failed_gives_its_turn_away(monkeypatch):
    inputs = make_inputs(SHAPES[0])
    expected = run(inputs).y_TH

    def interrupted(*_: object, **__: object) -> None:
        workspace_for(CPU).control.counters[:100] = 5
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(moe_kernel), "run", interrupted)
        run(inputs)
    (actual,) = in_a_thread(lambda: run(inputs).y_TH)
    assert_same_bits(actual=actual, expected=expected)


def test_a_custom_op_may_launch_inside_a_turn():
    inputs = make_inputs(SHAPES[0])
    expected = run(inputs).y_TH

    @torch.library.custom_op("megakernel_tests::layer", mutates_args=())
    def layer(x_TH: torch.Tensor) -> torch.Tensor:
        with TURN:
            return run(inputs).y_TH

    (actual,) = in_a_thread(lambda: layer(inputs.x_TH))
    assert_same_bits(actual=actual, expected=expected)


def test_threads_on_one_stream_share_its_workspace_in_turns(monkeypatch):
    """Each asks for memory and launches before the next one asks, also where it has to grow."""
    streams = make_up_streams(monkeypatch)
    inside, overlaps = [], []

    def launching(*arguments: object, **_: object) -> None:
        inside.append(arguments)
        overlaps.append(len(inside))
        time.sleep(0.01)  # let the others run
        inside.remove(arguments)

    monkeypatch.setattr(type(moe_kernel), "run", launching)
    sizes = [make_inputs(case) for case in SHAPES[:4]]
    threads = [Thread(target=run, args=(inputs,)) for inputs in sizes * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert overlaps == [1] * len(threads)
    assert set(streams.workspaces) == {(CPU, 0)}
    workspace = streams.of(0)
    assert all(
        memory.scratch.h_CI.untyped_storage().data_ptr() == workspace.arena.data_ptr()
        for memory in workspace.views.values()
    ), "views of memory that was outgrown"
