"""The tables of steps: within their time, and each leads to a function that is there."""

from importlib import import_module
from inspect import signature

import pytest

from perf.gpu.levers import LEVERS
from perf.gpu.plans import (
    BACKWARD_LADDER,
    FIRST_S,
    LADDER,
    PLANS,
    SECOND_S,
    TIMED,
    TRAINED,
    rehearsed,
)
from perf.gpu.steps import MOST_SILENT_S, Plan, Step
from perf.gpu.testing import TEST_S
from perf.problems.cases import SHAPES
from perf.suites.table import SUITES

STEPS = [step for plan in PLANS.values() for step in plan.steps]
named = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_calls_a_function_with_its_arguments(step: Step) -> None:
    module, _, name = step.call.partition(":")
    function = getattr(import_module(module), name)
    bound = signature(function).bind(None, *step.arguments)
    assert next(iter(bound.arguments)) == "context"


@named
def test_names_are_unique_and_fit_a_folder(plan: Plan) -> None:
    names = [step.name for step in plan.steps]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in
               map(str.lower, names))  # fmt: skip


def test_runs_are_as_long_as_was_agreed() -> None:
    assert (PLANS["first"].seconds, PLANS["second"].seconds) == (FIRST_S, SECOND_S) == (220, 400)


@named
def test_nobody_waits_long_for_a_hung_kernel(plan: Plan) -> None:
    """A rung has a hard limit; longer steps must talk, and only compiling may be silent longer."""
    for step in plan.steps:
        if step.interprets:
            assert min(step.limit_s, step.silence_s) <= MOST_SILENT_S == 40
    assert TEST_S < MOST_SILENT_S
    assert all(step.limit_s <= MOST_SILENT_S for step in (*LADDER, *BACKWARD_LADDER))


def test_a_rung_that_breaks_ends_the_run_and_explanations_have_their_subject() -> None:
    going_on = {step.name for step in LADDER if not step.stops}
    assert going_on == {"levers"}  # what is shipped is right without them
    names = {step.name for step in STEPS}
    assert {step.explains for step in STEPS} - {""} <= names
    order = [step.name for step in PLANS["first"].steps]
    assert order.index("fences") == order.index("repeats-rows128") + 1


def test_the_ladder_comes_before_any_time_is_taken() -> None:
    order = [step.name for step in PLANS["first"].steps]
    timed = [place for place, name in enumerate(order) if name.startswith("time")]
    assert min(timed) > max(order.index(step.name) for step in LADDER)
    assert len(timed) == len(TIMED) + 1 + len(TRAINED)


def test_the_backward_comes_when_the_forward_has_its_times() -> None:
    """What goes wrong in it takes no figure of the forward along, and has no figure itself."""
    order = [step.name for step in PLANS["first"].steps]
    rungs = [order.index(step.name) for step in BACKWARD_LADDER]
    timed = [place for place, name in enumerate(order) if name.startswith("time-backward")]
    others = [place for place, name in enumerate(order) if place not in (*rungs, *timed)]
    assert max(others) < min(rungs) < max(rungs) < min(timed)
    assert len(timed) == len(TRAINED) and set(TRAINED) <= set(TIMED)
    assert all(step.stops for step in BACKWARD_LADDER)


def test_models_and_suites_exist() -> None:
    arguments = [step.arguments[0] for step in STEPS if step.call.startswith("perf.gpu.suites")]
    assert {"forward", "backward", "train"} < set(arguments) <= set(SUITES)
    models = {
        step.arguments[0]
        for step in STEPS
        if step.call.startswith(("perf.gpu.levers", "perf.gpu.timing", "perf.gpu.training"))
    }
    assert models and models <= set(SHAPES)
    assert LEVERS


def test_what_other_people_built_comes_last() -> None:
    """A peer that hangs must not take our figures along, nor the time of our levers."""
    order = [step.arguments[2:] for step in PLANS["second"].steps]
    first = order.index(("peers",))
    assert first > 0 and set(order[first:]) == {("peers",)}


@named
def test_a_rehearsal_has_the_same_steps_and_more_patience(plan: Plan) -> None:
    patient = rehearsed(plan)
    assert [(one.name, one.call, one.arguments) for one in patient.steps] == [
        (one.name, one.call, one.arguments) for one in plan.steps
    ]
    assert patient.seconds > plan.seconds
