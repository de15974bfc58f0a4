"""Run one launch of the layer under the check."""

from functools import cache
from typing import Any

from tests.helpers.race.events import Names
from tests.helpers.race.layer import kernel
from tests.helpers.race.layer.launches import Launch
from tests.helpers.race.memory import POISON
from tests.helpers.race.record import Recorder
from tests.helpers.race.watch import watch


def assert_no_race(launch: Launch, tasks_per_worker: int | None, polls_fail: bool = False) -> Any:
    """Return the outputs of a launch, if nothing in it is left to luck.

    Args:
        launch: what to run.
        tasks_per_worker: how many tasks a worker may claim before it has to leave: None for one
            worker that runs them all; 1 makes every order come from the waits of the task itself,
            2 and more show what a worker wrongly takes for acquired.
        polls_fail: whether every wait has to poll twice. Its signals are always there, since the
            interpreter runs one task after another.

    Raises:
        RaceError: saying which task, which element, and what is missing.
    """
    num_workers = 1
    if tasks_per_worker is not None:
        num_workers = -(-count_tasks(launch) // tasks_per_worker)
    recorder = Recorder(
        Names(kernel.name_task, kernel.name_counter),
        kernel.claim_address,
        lambda worker, claimed: tasks_per_worker is None or claimed < tasks_per_worker,
        one_unit=tasks_per_worker == 1,
        polls_fail=polls_fail,
    )
    kernel.workspace().fill_scratch(POISON)
    try:
        outputs, check = watch(
            lambda: launch.call(num_workers), recorder, lambda: [kernel.workspace().arena]
        )
        left = kernel.counters_left()
        check.dropped = kernel.padding()
        check.findings += [f"{counter} is not zero at the end" for counter in left]
        check.run()
    finally:
        kernel.workspace().reset()  # the next launch is not to suffer for this one
    return outputs


@cache
def count_tasks(launch: Launch) -> int:
    """Return the length of a launch's task list."""
    launch.call()
    return kernel.latest_schedule().num_tasks
