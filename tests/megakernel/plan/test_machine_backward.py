"""The Python machine of the backward: right to the last bits, and what the kernel leaves too."""

from dataclasses import replace
from random import Random

import pytest
import torch
from _pytest.mark import ParameterSet

from megakernel.autograd import DIFFERENTIABLE, with_saved
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.buffers import flatten
from megakernel.plan.machine import Machine
from megakernel.plan.machine_memory import ADDED
from megakernel.plan.schedule import Schedule, Task
from tests.helpers.compare import assert_same_bits
from tests.helpers.dialects import TINY, Dialect, make_dialect
from tests.helpers.gradients import LAYERS, relative_error
from tests.helpers.plan.backwards import Backward, make_backward
from tests.helpers.plan.machines import (
    assert_any_order_leaves_the_same,
    assert_same_buffers,
    machine_of,
)

EVERYTHING = Dialect(
    "everything", "every kind of task and every gradient there is", shared=(56, True),
    router={"bias_E": True}, experts={"gate_up_bias_E2I": True, "down_bias_EH": True},
)  # fmt: skip
LAYER_OF_NAME = {one.name: one for one in [*LAYERS, EVERYTHING]}
SAVES = ("preactivations", "nothing")
# In `make test` some dialects of each sort; `make test-all` runs every one.
SAMPLE = {
    "everything", "live", "given-wide", "replay-absent", "replay-nothing", "one-token",
    "odd-widths", "over-all-replay", "deepseek", "capacity-even", "random-second", "nemotron",
    "gpt-oss", "gelu", "gelu-tanh", "shared-no-gate", "shared-alone",
}  # fmt: skip


def sampled(dialects: list[Dialect], sample: set[str]) -> list[ParameterSet]:
    """Return the dialects as parameters, those outside of the sample marked slow."""
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in sample else pytest.mark.slow)
        for one in dialects
    ]


def assert_true(backward: Backward, machine: Machine, wanted: list[str]) -> None:
    """Fail unless a machine that rounds nothing has the oracle's gradients."""
    left, truth = flatten(machine.memory.buffers()), backward.truth
    for name in wanted:
        ours = left[f"gradients.{DIFFERENTIABLE[name]}"]
        assert ours.dtype == torch.float64
        assert relative_error(ours, truth[name]) <= 1e-10, name


@pytest.mark.parametrize("dialect", sampled([*LAYERS, EVERYTHING], SAMPLE))
def test_the_tasks_mean_the_gradients_whoever_runs_them(dialect: Dialect) -> None:
    assert_gradients(dialect, "preactivations")


@pytest.mark.parametrize("dialect", sampled([*LAYERS, EVERYTHING], {"everything", "gpt-oss"}))
def test_and_so_they_do_where_nothing_was_kept(dialect: Dialect) -> None:
    assert_gradients(dialect, "nothing")


def assert_gradients(dialect: Dialect, save: str) -> None:
    """Fail unless one worker, and several in any order, make the oracle's gradients."""
    backward = make_backward(dialect, save, exact=True)
    for num_workers in (1, 5):
        machine = machine_of(backward.call, exact=True)
        machine.run(num_workers, Random(num_workers) if num_workers > 1 else None)
        assert_true(backward, machine, [*backward.truth])


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "routing.gate_TK"])
def test_one_gradient_alone_is_as_right(name: str) -> None:
    """Everything else is frozen: its tasks are not in the list, its scratch is not there."""
    backward = make_backward(small(EVERYTHING), "nothing", wanted=(name,), exact=True)
    machine = machine_of(backward.call, exact=True)
    machine.run(3, Random(3))
    assert_true(backward, machine, [name])
    memory = machine.memory
    assert {n for n in memory.writer if n.startswith("gradients.")} == {
        f"gradients.{DIFFERENTIABLE[name]}"
    }
    needing = {
        "scratch.a_CI": {"experts.down_EHI", "shared.down_HJ"},
        "scratch.dx_CH": {"x_TH"},
        "scratch.dlogits_TE": {
            "x_TH",
            "router.weight_EH",
            "router.bias_E",
            "shared.token_gate_1H",
        },
    }
    assert {n for n in needing if n in memory} == {n for n in needing if name in needing[n]}


def test_the_gradient_of_given_weights_alone_is_as_right() -> None:
    dialect = LAYER_OF_NAME["given-absent"]
    backward = make_backward(dialect, wanted=("routing.gate_TK",), exact=True)
    machine = machine_of(backward.call, exact=True)
    machine.run(3, Random(3))
    assert_true(backward, machine, ["routing.gate_TK"])


@pytest.mark.parametrize("name", ["many-experts", "shared-replay"])
def test_gradients_are_added_once_to_what_is_there(name: str) -> None:
    backward = make_backward(LAYER_OF_NAME[name], is_added=True, exact=True)
    before = {n: flatten(backward.call.buffers)[n].double() for n in ADDED}
    machine = machine_of(backward.call, exact=True)
    machine.run(3, Random(3))
    left, truth, memory = flatten(machine.memory.buffers()), backward.truth, machine.memory
    for n, weight in zip(ADDED, ("experts.gate_up_E2IH", "experts.down_EHI"), strict=True):
        assert relative_error(left[n], before[n] + truth[weight]) <= 1e-10
        is_empty = memory.values["rows.rows_of_E"] == 0
        assert torch.equal(left[n][is_empty], before[n][is_empty])
        assert bool((memory.writer[n][is_empty] < 0).all()), "an empty expert's tiles are written"
    assert_true(backward, machine, ["x_TH"])


# What the kernel leaves.

CASES = [
    ("shared-live", "nothing", False, "FFN1 runs again, the token gate, the router"),
    ("gpt-oss", "preactivations", False, "interleaved, transposed, clamped, biases"),
    ("replay-even", "preactivations", True, "tables from outside, added to float32 buffers"),
    ("bfloat16", "nothing", True, "16-bit weights whose gradients are kept wide"),
]
SMALL_SIZES = {"T": 19, "H": 24}  # two token tiles, two blocks of each width


def small(dialect: Dialect) -> Dialect:
    """Return a dialect with less to do, for what takes long."""
    capacity = {"capacity": 6} if "capacity" in dialect.router else {}
    return replace(dialect, sizes=SMALL_SIZES | dialect.sizes, router=dialect.router | capacity)


@pytest.mark.parametrize(
    ("name", "save", "is_added"),
    [pytest.param(*case, id=f"{case[0]}: {reason}") for *case, reason in CASES],
)
def test_the_kernel_leaves_in_every_buffer_what_the_machine_does(
    name: str, save: str, is_added: bool
) -> None:
    dialect = small(LAYER_OF_NAME[name])
    assert_same_buffers(make_backward(dialect, save, is_added=is_added).call)


# Rules of weights and activations, each with the few tasks that lead through it.
RULES = [
    *((name, "router.weight_EH") for name in
      ("over-all-replay", "sigmoid-replay", "sigmoid", "replay-absent", "gshard")),
    *((name, "experts.gate_up_bias_E2I") for name in ("relu", "nemotron")),
    *((name, "routing.gate_TK") for name in ("given-absent", "given-nothing")),
    ("gelu", "router.weight_EH"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), RULES)
def test_the_kernel_goes_back_through_every_rule_as_the_machine_does(
    name: str, wanted: str
) -> None:
    assert_same_buffers(make_backward(small(LAYER_OF_NAME[name]), wanted=(wanted,)).call)


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh"])
def test_the_kernel_has_the_slope_of_every_activation(name: str) -> None:
    dialect = replace(LAYER_OF_NAME[name], sizes={"T": 9, "H": 16, "E": 2, "I": 24})
    assert_same_buffers(make_backward(dialect, wanted=("experts.gate_up_E2IH",)).call)


@pytest.mark.parametrize("name", ["gpt-oss", "shared-given"])
def test_the_kernel_stores_wide_tiles_a_few_columns_at_a_time(name: str) -> None:
    """Blocks of more columns than are finished or stored at once, the last of them not full."""
    config = replace(TINY, block_i=64, block_h=128)
    dialect = replace(LAYER_OF_NAME[name], sizes={"T": 9, "H": 150, "I": 70, "E": 2})
    assert_same_buffers(make_backward(dialect, "nothing", config=config).call)


@pytest.mark.parametrize("name", ["shared.gate_JH", "shared.up_JH"])
def test_the_kernel_writes_the_gradient_of_a_shared_gate_or_up_that_is_asked_for_alone(
    name: str,
) -> None:
    dialect = replace(LAYER_OF_NAME["shared-live"], sizes={"T": 5, "H": 24, "I": 16})
    assert_same_buffers(make_backward(dialect, wanted=(name,)).call)


@pytest.mark.slow
@pytest.mark.parametrize(("save", "is_added"), [("preactivations", False), ("nothing", True)])
@pytest.mark.parametrize("dialect", [*LAYERS, EVERYTHING], ids=lambda dialect: dialect.name)
def test_and_so_it_does_in_every_dialect(dialect: Dialect, save: str, is_added: bool) -> None:
    assert_same_buffers(make_backward(dialect, save, is_added=is_added).call)


FORWARDS = {"shared-live", "gshard", "gpt-oss"}


@pytest.mark.parametrize("dialect", sampled([*LAYERS, EVERYTHING], FORWARDS))
def test_a_forward_keeps_what_the_machine_does(dialect: Dialect) -> None:
    call = with_saved(make_dialect(small(dialect)), "preactivations")
    kept = {name for name in machine_of(call).memory.writer if name.startswith("saved.")}
    assert "saved.z_A2I" in kept
    assert ("saved.chosen_TK" in kept) == (dialect.name in {
        "gshard", "random-second", "capacity", "capacity-even"
    })  # fmt: skip
    assert_same_buffers(call)


# Waits.


def kind_of(counter: int, spec: BackwardSpec) -> int:
    """Return one number for all counters of a sort."""
    past = counter - spec.first_tile_counter
    return counter if past < 0 else spec.first_tile_counter + past % spec.counters_per_tile


def asked_of(machine: Machine) -> set[tuple[int, int]]:
    """Return the (kind of task, kind of counter) pairs of all waits, those for tables apart."""
    assert isinstance(machine.spec, BackwardSpec) and machine.made is not None
    return {
        (machine.made.task(task_id).kind, kind_of(counter, machine.spec))
        for task_id in range(machine.made.num_tasks)
        for counter, _ in machine.made.waits(task_id)
        if counter != machine.spec.SCATTER_DONE
    }


def test_no_wait_of_any_kind_of_task_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker runs the list in order, and still the machine sees each missing wait."""
    call = make_backward(small(EVERYTHING), "nothing").call
    whole, waits = machine_of(call), Schedule.waits
    whole.run()
    spec = whole.spec
    assert isinstance(spec, BackwardSpec)
    pairs = asked_of(whole)
    waiting = spec.held - {spec.ROUTE, spec.SHARED_FFN1, spec.FFN1}
    assert {kind for kind, _ in pairs} == waiting and len(pairs) == len(waiting) + 1  # dx has two
    for left_out in sorted(pairs):

        def without(schedule: Schedule, task_id: int, left_out=left_out) -> list[tuple[int, int]]:
            kind = schedule.task(task_id).kind
            asked = waits(schedule, task_id)
            return [wait for wait in asked if (kind, kind_of(wait[0], spec)) != left_out]

        monkeypatch.setattr(Schedule, "waits", without)
        with pytest.raises(RuntimeError, match="without waiting for task"):
            machine_of(call).run()


def test_the_row_tables_have_to_be_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_backward(small(EVERYTHING)).call
    machine = machine_of(call)
    monkeypatch.setattr(machine, "table_wait", (machine.spec.PREFIX_DONE, 1))
    with pytest.raises(RuntimeError, match=r"num_tiles_1.*without waiting for task"):
        machine.run()


@pytest.mark.parametrize("kind", ["DH", "SHARED_DH", "DX", "DS", "FFN1"])
def test_no_signal_of_any_kind_of_task_can_be_left_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_backward(small(EVERYTHING), "nothing").call
    number, signals = getattr(machine_of(call).spec, kind), Schedule.signals

    def without(schedule: Schedule, task: Task) -> list[int]:
        return [] if task.kind == number else signals(schedule, task)

    monkeypatch.setattr(Schedule, "signals", without)
    with pytest.raises(RuntimeError, match="to reach"):
        machine_of(call).run(4, Random(4))


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES)
def test_any_number_of_workers_in_any_order_leaves_the_same_buffers(save: str) -> None:
    assert_any_order_leaves_the_same(make_backward(small(EVERYTHING), save).call)


def test_gradients_do_not_depend_on_the_placement_of_the_forward() -> None:
    found = {}
    for name in ("live", "live-even"):
        call = make_backward(LAYER_OF_NAME[name]).call
        found[name] = flatten(machine_of(call).run().gradients)
    for name, expected in found["live"].items():
        assert_same_bits(actual=found["live-even"][name], expected=expected)
