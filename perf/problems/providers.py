"""Who computes the layer: ours in three modes, eager PyTorch, grouped GEMMs; and the check of all.

A provider is prepared for a problem and returns a call without arguments, which is what gets
timed. Every provider's call includes the gate except ``ours routed``, whose routing is given. The
packages of peers are imported when they are prepared, and only then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import silu

import megakernel
import reference
from megakernel.tools.models import ModelShape
from perf.problems.cases import Case, make_ids

# Logits have this standard deviation, and those of the chosen experts lie so many above the rest:
# far enough that bfloat16 cannot change a choice, and small enough that it weighs them well.
LOGIT_SPREAD = 0.25
LIFT_SPREADS = 12.0
# A provider's error against float64 may be this many times that of eager PyTorch.
MOST_TIMES_EAGER_ERROR = 3.0

Call = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Random tensors whose gate routes as the case demands.

    Attributes:
        case: what they were made for.
        x_TH, router_EH, gate_up_E2IH, down_EHI: one dtype; outputs are of order 1.
        expert_of_TK: int32, best first, what a live gate chooses.
        gate_TK: float32, renormalised.
    """

    case: Case
    x_TH: Tensor
    router_EH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_of_TK.shape[1]


@dataclass(frozen=True)
class Provider:
    """One implementation of the layer.

    Attributes:
        name: in results.
        prepare: makes the call for a problem.
        package: what must be importable, None for what is always there.
        needs_gpu: whether it cannot run on a CPU.
        capturable: whether a CUDA graph can hold the call; False where it synchronises.
        is_ours: whether its failure is ours.
        has_gate: whether the call computes the gate.
    """

    name: str
    prepare: Callable[[Problem], Call]
    package: str | None = None
    needs_gpu: bool = False
    capturable: bool = True
    is_ours: bool = False
    has_gate: bool = True

    def why_missing(self, device: torch.device) -> str | None:
        """Return why this provider cannot run here, or None."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def make_problem(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Return random tensors for a case.

    The router's rows are orthogonal, and each token gets the rows of its experts added, so that
    a live gate chooses exactly the experts of the scenario.

    Raises:
        ValueError: if H < E, where rows cannot be orthogonal.
    """
    model = case.model
    if model.hidden < model.num_experts:
        raise ValueError(f"hidden must be at least E={model.num_experts}, got {model.hidden}")
    random = torch.Generator(device).manual_seed(case.seed)
    gate_up_E2IH, down_EHI, router_EH = make_weights(model, device, dtype)
    ids_TK = torch.from_numpy(make_ids(case)).to(device)
    x_TH = torch.randn(case.num_tokens, model.hidden, generator=random, device=device)
    for choice in range(model.top_k):
        x_TH += LIFT_SPREADS / LOGIT_SPREAD * router_EH[ids_TK[:, choice]]
    x_TH = x_TH.to(dtype)
    routing = reference.route(x_TH.float(), router_EH.float(), model.top_k)
    if not torch.equal(routing.expert_of_TK.sort(1).values, ids_TK.sort(1).values):
        raise RuntimeError(f"the gate does not choose the experts of {case.name}")
    return Problem(
        case, x_TH, router_EH, gate_up_E2IH, down_EHI, routing.expert_of_TK.int(), routing.gate_TK
    )


@lru_cache(maxsize=1)
def make_weights(
    model: ModelShape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate_up_E2IH, down_EHI and router_EH; the last model's are kept."""
    E, H, I = model.num_experts, model.hidden, model.intermediate
    random = torch.Generator(device).manual_seed(1)
    gate_up = torch.empty(E, 2 * I, H, dtype=dtype, device=device)
    down = torch.empty(E, H, I, dtype=dtype, device=device)
    gate_up.normal_(std=H**-0.5, generator=random)
    down.normal_(std=I**-0.5, generator=random)
    router_HE, _ = torch.linalg.qr(torch.randn(H, E, generator=random, device=device))
    return gate_up, down, (LOGIT_SPREAD * router_HE.T).contiguous().to(dtype)


def live_output(problem: Problem) -> Callable[[], megakernel.MoEOutput]:
    """Return the call with a live gate, all its outputs included."""
    experts = megakernel.Experts(problem.gate_up_E2IH, problem.down_EHI)
    router = megakernel.Router(problem.top_k)
    return lambda: megakernel.moe(problem.x_TH, problem.router_EH, experts, router)


def replay_output(problem: Problem) -> Callable[[], megakernel.MoEOutput]:
    """Return the call with replayed ids, their row tables built here, ahead."""
    experts = megakernel.Experts(problem.gate_up_E2IH, problem.down_EHI)
    router = megakernel.Router(problem.top_k)
    replay = megakernel.prepare_replay(problem.expert_of_TK, experts.num_experts, experts=experts)
    return lambda: megakernel.moe(problem.x_TH, problem.router_EH, experts, router, replay=replay)


def ours_live(problem: Problem) -> Call:
    """Gate, dispatch, FFN and combine in one launch."""
    call = live_output(problem)
    return lambda: call().y_TH


def ours_replay(problem: Problem) -> Call:
    """The same with known ids; the gate still weighs them."""
    call = replay_output(problem)
    return lambda: call().y_TH


def ours_routed(problem: Problem) -> Call:
    """Ids and weights are given; no gate."""
    experts = megakernel.Experts(problem.gate_up_E2IH, problem.down_EHI)
    return lambda: megakernel.moe_routed(
        problem.x_TH, problem.expert_of_TK, problem.gate_TK, experts
    )


def eager(problem: Problem) -> Call:
    """The loop over experts of the reference, its gate included."""
    return lambda: reference.moe(
        problem.x_TH,
        problem.router_EH,
        problem.gate_up_E2IH,
        problem.down_EHI,
        problem.top_k,
    )


def torch_gate(problem: Problem) -> tuple[Tensor, Tensor]:
    """The quickest gate of plain PyTorch, given to every peer without one of its own."""
    logits_TE = problem.x_TH @ problem.router_EH.T
    top = logits_TE.topk(problem.top_k, dim=1)
    return top.indices, top.values.float().softmax(1)


def grouped_mm(problem: Problem) -> Call:
    """Sort by expert, two grouped products of PyTorch, unsort, weighted sum."""

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_gate(problem)
        T, K = expert_of_TK.shape
        in_order_A, order_A = expert_of_TK.flatten().sort(stable=True)
        experts_E = torch.arange(len(problem.down_EHI), device=in_order_A.device)
        end_E = torch.searchsorted(in_order_A, experts_E, right=True).int()
        x_AH = problem.x_TH[order_A // K]
        gate_up_A2I = torch.nn.functional.grouped_mm(
            x_AH, problem.gate_up_E2IH.transpose(1, 2), offs=end_E
        )
        gate_AI, up_AI = gate_up_A2I.chunk(2, dim=1)
        sorted_AH = torch.nn.functional.grouped_mm(
            silu(gate_AI) * up_AI, problem.down_EHI.transpose(1, 2), offs=end_E
        )
        y_AH = torch.empty_like(sorted_AH)
        y_AH[order_A] = sorted_AH
        return (y_AH.view(T, K, -1) * gate_TK[..., None].to(y_AH.dtype)).sum(1)

    return call


OURS = (
    Provider("ours live", ours_live, is_ours=True),
    Provider("ours replay", ours_replay, is_ours=True),
    Provider("ours routed", ours_routed, is_ours=True, has_gate=False),
)
PLAIN = (
    Provider("eager loop", eager, capturable=False),
    Provider("grouped_mm", grouped_mm),
)


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
    """Providers that are checked and may be timed, and why the others are not."""

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
        try:
            call = provider.prepare(problem)
            reason = why_wrong(call(), problem, truth_TH, eager_error)
        except Exception as error:  # whatever other people's packages raise
            if provider.is_ours:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is None:
            ready.calls[provider.name] = call
        elif provider.is_ours:
            ready.failed[provider.name] = reason
        else:
            ready.skipped[provider.name] = reason
    return ready
