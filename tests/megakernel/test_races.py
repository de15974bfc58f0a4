"""No launch is left to luck: every access is ordered, by guarantee, after what it depends on."""

import pytest

from tests.helpers.race.layer.launch import assert_no_race
from tests.helpers.race.layer.launches import LAUNCHES, Launch
from tests.helpers.race.weak.mutants import HARMLESS, Mutant

LAUNCH_OF_NAME = {launch.name: launch for launch in LAUNCHES}
# Tasks per worker, and whether every wait has to poll twice.
WAYS = [(1, False), (1, True), (2, True), (3, False), (None, False)]


def name_of(case: Launch | Mutant) -> str:
    """Return the id pytest shows."""
    return case.name


@pytest.mark.parametrize("launch", [case for case in LAUNCHES if case.sampled], ids=name_of)
def test_every_task_is_ordered_by_its_own_waits(launch: Launch) -> None:
    assert_no_race(launch, tasks_per_worker=1)


@pytest.mark.parametrize(
    ("name", "tasks_per_worker", "polls_fail"),
    [("live", 2, True), ("live", None, False), ("shared-replay", None, True)],
)
def test_workers_that_run_several_tasks_take_nothing_for_acquired(
    name: str, tasks_per_worker: int | None, polls_fail: bool
) -> None:
    assert_no_race(LAUNCH_OF_NAME[name], tasks_per_worker, polls_fail)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks_per_worker", "polls_fail"), WAYS)
@pytest.mark.parametrize("launch", LAUNCHES, ids=name_of)
def test_every_access_is_ordered_however_tasks_are_dealt(
    launch: Launch, tasks_per_worker: int | None, polls_fail: bool
) -> None:
    assert_no_race(launch, tasks_per_worker, polls_fail)


@pytest.mark.parametrize("tasks_per_worker", [1, 2, None], ids=str)
@pytest.mark.parametrize("change", HARMLESS, ids=name_of)
def test_a_harmless_change_passes(change: Mutant, tasks_per_worker: int | None) -> None:
    with change.applied():
        assert_no_race(LAUNCH_OF_NAME[change.launch], tasks_per_worker)
