"""The race check sees what it is for: every weakness of the kernel in the table turns it red."""

import re

import pytest

from megakernel import MegakernelStall
from tests.helpers.race.events import RaceError
from tests.helpers.race.layer.launch import assert_no_race
from tests.helpers.race.layer.launches import LAUNCHES
from tests.helpers.race.weak.mutants import MUTANTS, Mutant, table
from tests.helpers.sources import ROOT

LAUNCH_OF_NAME = {launch.name: launch for launch in LAUNCHES}
PAGE = ROOT / "docs" / "race-check.md"


def marked(mutant: Mutant) -> object:
    """Leave the mutants that are no sample to ``make test-all``."""
    return pytest.param(mutant, id=mutant.name, marks=() if mutant.sampled else pytest.mark.slow)


@pytest.mark.parametrize("mutant", [marked(mutant) for mutant in MUTANTS])
def test_mutant_is_refused(mutant: Mutant) -> None:
    launch = LAUNCH_OF_NAME[mutant.launch]
    with mutant.applied(), pytest.raises((RaceError, MegakernelStall)) as refusal:
        assert_no_race(launch, mutant.tasks_per_worker, mutant.polls_fail)
    findings = getattr(refusal.value, "findings", [str(refusal.value)])
    assert any(re.search(mutant.finding, finding) for finding in findings), findings[:5]


def test_mutants_are_named_once() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 120


def test_the_page_has_the_table() -> None:
    rows = "\n".join(re.findall(r"^\|.*$", PAGE.read_text(), re.MULTILINE))
    assert rows == table(), f"{PAGE.name} is to end with:\n{table()}"
