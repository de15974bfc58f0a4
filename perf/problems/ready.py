"""Who may be timed: providers that agree with float64 in the same run, and why others may not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import reference
from perf.problems.providers import Call, Provider, eager
from perf.problems.tensors import Problem
from perf.problems.tuning import quick_autotuning

# A provider's error against float64 may be this many times that of eager PyTorch.
MOST_TIMES_EAGER_ERROR = 3.0


def true_output(problem: Problem) -> Tensor:
    """Return y_TH in float64 by the reference, one expert's weights at a time."""
    y_TH = torch.zeros_like(problem.x_TH, dtype=torch.float64)
    for expert in problem.expert_of_TK.unique().tolist():
        tokens = (problem.expert_of_TK == expert).any(1).nonzero()[:, 0]
        is_other = problem.expert_of_TK[tokens] != expert
        y_TH[tokens] += reference.moe_by_expert(
            problem.x_TH[tokens].double(),
            torch.where(is_other, -1, 0),
            problem.gate_TK[tokens].double(),
            problem.gate_up_E2IH[expert : expert + 1].double(),
            problem.down_EHI[expert : expert + 1].double(),
        )
    return y_TH


def rms_error(y_TH: Tensor, truth_TH: Tensor) -> float:
    """Root mean square of the difference over that of the truth; infinite when not finite."""
    error = (y_TH.double() - truth_TH).square().mean().sqrt() / truth_TH.square().mean().sqrt()
    return error.item() if bool(error.isfinite()) else float("inf")


def why_wrong(y_TH: Tensor, problem: Problem, truth_TH: Tensor, eager_error: float) -> str | None:
    """Return why an output must not be timed, or None.

    Its error against float64 may be three times that of the eager loop in the same dtype.
    """
    if y_TH.shape != problem.x_TH.shape or y_TH.dtype != problem.x_TH.dtype:
        return f"wrong output: {tuple(y_TH.shape)} {y_TH.dtype}"
    error = rms_error(y_TH, truth_TH)
    limit = MOST_TIMES_EAGER_ERROR * eager_error
    return None if error <= limit else f"wrong output: error {error:.1e} is over {limit:.1e}"


@dataclass(frozen=True)
class Ready:
    """Providers that are checked and may be timed, and why the others are not.

    Attributes:
        calls: of those that agree, by name.
        skipped: reason of each peer that is not here, breaks or is wrong.
        failed: reason of each of ours that is wrong.
    """

    calls: dict[str, Call]
    skipped: dict[str, str]
    failed: dict[str, str]


def prepare(
    problem: Problem, providers: Sequence[Provider], say: Callable[[str], object] = lambda text: 0
) -> Ready:
    """Prepare, run and check each provider; a peer that breaks is skipped with its error.

    Args:
        problem: the tensors.
        providers: whom to prepare.
        say: told the name of each.
    """
    ready = Ready({}, {}, {})
    truth_TH = true_output(problem)
    eager_error = rms_error(eager(problem)(), truth_TH)
    for provider in providers:
        say(provider.name)
        if reason := provider.why_missing(problem.x_TH.device):
            ready.skipped[provider.name] = reason
            continue
        answer = _prepare_one(provider, problem, truth_TH, eager_error)
        if not isinstance(answer, str):
            ready.calls[provider.name] = answer
        elif provider.is_ours:
            ready.failed[provider.name] = answer
        else:
            ready.skipped[provider.name] = answer
    return ready


def _prepare_one(
    provider: Provider, problem: Problem, truth_TH: Tensor, eager_error: float
) -> Call | str:
    """Return the checked call, or why it must not be timed; an error of ours is raised."""
    try:
        with quick_autotuning(problem.x_TH.device):
            call = provider.prepare(problem)
            y_TH = call()
        reason = why_wrong(y_TH, problem, truth_TH, eager_error)
    except Exception as error:  # whatever other people's packages raise
        if provider.is_ours:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return reason or call
