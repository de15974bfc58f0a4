"""Who may be timed: providers that agree with float64 in the same run, and why others may not."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

import reference
from perf.problems.providers import Call, Provider, eager
from perf.problems.tensors import Problem
from perf.problems.tuning import quick_autotuning

# A provider's error against float64 may be this many times that of eager PyTorch.
MOST_TIMES_EAGER_ERROR = 3.0
Timed = TypeVar("Timed")


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


class Ready(NamedTuple, Generic[Timed]):
    """Providers that are checked and may be timed, and why the others are not.

    Attributes:
        calls: what is to be timed of those that agree, by name.
        skipped: reason of each peer that is not here, breaks or is wrong.
        failed: reason of each of ours that is wrong.
    """

    calls: dict[str, Timed]
    skipped: dict[str, str]
    failed: dict[str, str]


def prepare(
    problem: Problem, providers: Sequence[Provider], say: Callable[[str], object] = lambda text: 0
) -> Ready[Call]:
    """Prepare, run and check each provider; a peer that breaks is skipped with its error.

    Args:
        problem: the tensors.
        providers: whom to prepare.
        say: told the name of each.
    """
    truth_TH = true_output(problem)
    eager_error = rms_error(eager(problem)(), truth_TH)

    def check(provider: Provider) -> tuple[Call, str | None]:
        call = provider.prepare(problem)
        return call, why_wrong(call(), problem, truth_TH, eager_error)

    return prepare_each(providers, check, problem.x_TH.device, say)


def prepare_each(
    providers: Sequence[Provider],
    check: Callable[[Provider], tuple[Timed, str | None]],
    device: torch.device,
    say: Callable[[str], object],
) -> Ready[Timed]:
    """Check each provider; a peer that breaks is skipped with its error, an error of ours raised.

    Args:
        providers: whom to check.
        check: makes what is to be timed, runs it, and says why it must not be, or None.
        device: where.
        say: told the name of each.
    """
    ready: Ready[Timed] = Ready({}, {}, {})
    for provider in providers:
        say(provider.name)
        if reason := provider.why_missing(device):
            ready.skipped[provider.name] = reason
            continue
        one, reason = _checked(provider, check, device)
        if one is not None and reason is None:
            ready.calls[provider.name] = one
        else:
            refused = ready.failed if provider.is_ours else ready.skipped
            refused[provider.name] = str(reason)
    return ready


def _checked(
    provider: Provider,
    check: Callable[[Provider], tuple[Timed, str | None]],
    device: torch.device,
) -> tuple[Timed | None, str | None]:
    try:
        with quick_autotuning(device):
            return check(provider)
    except Exception as error:  # whatever other people's packages raise
        if provider.is_ours:
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
