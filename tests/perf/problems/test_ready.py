"""Who may be timed: only providers that agree with the reference in the same run."""

import pytest
import torch

import reference
from perf.problems.cases import TINY, Case
from perf.problems.providers import Provider, eager
from perf.problems.ready import prepare, rms_error, true_output, why_wrong
from perf.problems.tensors import make_problem


@pytest.fixture(scope="module")
def problem():
    return make_problem(Case(TINY, 20, "zipf"), torch.device("cpu"))


def test_the_truth_is_the_reference_token_by_token(problem):
    truth_TH = reference.moe_by_token(
        problem.x_TH, problem.expert_of_TK, problem.gate_TK, problem.gate_up_E2IH,
        problem.down_EHI,
    )  # fmt: skip
    assert torch.allclose(true_output(problem), truth_TH, rtol=1e-10, atol=1e-12)


def one_expert_wrong(problem):
    y_TH = eager(problem)()
    y_TH[problem.expert_of_TK[:, 0] == 3] *= 1.5
    return lambda: y_TH


WRONG = {
    "nan": lambda p: lambda: eager(p)() * float("nan"),
    "one expert wrong": one_expert_wrong,
    "other dtype": lambda p: lambda: eager(p)().float(),
    "rows missing": lambda p: lambda: eager(p)()[1:],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_peer_is_skipped_and_a_wrong_one_of_ours_fails(problem, kind):
    peer, ours = Provider("peer", WRONG[kind]), Provider("ours", WRONG[kind], is_ours=True)
    ready = prepare(problem, (peer, ours))
    assert not ready.calls
    assert ready.skipped["peer"].startswith("wrong output")
    assert ready.failed["ours"].startswith("wrong output")


def breaks(problem):
    raise RuntimeError("no kernel image\nfor this device")


def test_a_peer_that_breaks_is_skipped_with_its_error(problem):
    ready = prepare(problem, (Provider("peer", breaks),))
    assert ready.skipped == {"peer": "RuntimeError: no kernel image"}


def test_an_error_of_ours_is_not_swallowed(problem):
    with pytest.raises(RuntimeError, match="no kernel image"):
        prepare(problem, (Provider("ours", breaks, is_ours=True),))


def test_what_is_not_here_is_skipped_with_the_reason(problem):
    missing = Provider("peer", breaks, package="no_such_package")
    gpu_only = Provider("other", breaks, needs_gpu=True)
    ready = prepare(problem, (missing, gpu_only))
    assert ready.skipped == {
        "peer": "no_such_package is not installed",
        "other": "needs a GPU",
    }


def test_an_output_within_the_eager_error_passes(problem):
    truth_TH, y_TH = true_output(problem), eager(problem)()
    error = rms_error(y_TH, truth_TH)
    assert 0 < error < 0.01
    assert why_wrong(y_TH, problem, truth_TH, error) is None
    assert "is over" in why_wrong(y_TH, problem, truth_TH, error / 4)
