"""No launch is left to luck: every access is ordered, by guarantee, after what it depends on."""

import pytest

from tests.helpers.race.launch import assert_no_race
from tests.helpers.race.launches import LAUNCHES, Launch

SAMPLED = [launch for launch in LAUNCHES if launch.sampled]


def name_of(launch: Launch) -> str:
    """Return the id pytest shows."""
    return launch.name


@pytest.mark.parametrize("launch", SAMPLED, ids=name_of)
def test_every_task_is_ordered_by_its_own_waits(launch: Launch) -> None:
    assert_no_race(launch, tasks_per_worker=1)


@pytest.mark.slow
@pytest.mark.parametrize("tasks_per_worker", [1, 2, 3, None], ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=name_of)
def test_every_access_is_ordered_however_tasks_are_dealt(
    launch: Launch, tasks_per_worker: int | None
) -> None:
    assert_no_race(launch, tasks_per_worker)
