from perf.__main__ import main
from perf.problems.cases import SCENARIOS, SHAPES
from perf.problems.peers import ALL_PROVIDERS
from perf.suites.command import SUITES


def test_everything_that_can_be_chosen_is_listed(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    names = [*SUITES, *SHAPES, *SCENARIOS, *(provider.name for provider in ALL_PROVIDERS)]
    assert [name for name in names if name not in out] == []
