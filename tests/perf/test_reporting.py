"""The report's command: results and predictions drawn, anything else refused by name."""

import pytest

from perf.__main__ import main
from perf.problems.cases import TINY, Case
from perf.reporting import draw_predicted
from perf.results import record
from tests.perf.results.test_report import rows_of_all_suites


def test_predicted_timelines_are_named_so(tmp_path):
    written = draw_predicted(Case(TINY, 20, "recorded"), tmp_path)
    assert [path.stem for path in written] == [
        "timeline_live_predicted", "timeline_replay_predicted",
    ]  # fmt: skip


def test_the_command_draws_results_and_a_predicted_timeline(tmp_path, capsys):
    record.write(rows_of_all_suites(), tmp_path / "results.csv")
    argv = ["report", str(tmp_path / "results.csv"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--model", "tiny", "--tokens", "50"]) == 0
    assert "timeline_live_predicted.png" in capsys.readouterr().out
    assert (tmp_path / "out" / "timeline_replay_predicted.png").exists()


HEADER = ",".join(record.COLUMNS)


@pytest.mark.parametrize(
    "text",
    [None, "a,b\n1,2\n", f"{HEADER}\nforward,x\n", f"{HEADER}\n{'abc,' * 15}abc\n"],
    ids=["missing", "other-columns", "cut-off-line", "no-number"],
)
def test_what_is_no_result_is_refused(tmp_path, text, capsys):
    path = tmp_path / "x.csv"
    if text:
        path.write_text(text)
    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    assert "perf report:" in capsys.readouterr().err
